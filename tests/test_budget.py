"""Reservations of device memory: never more than there is, and as few evictions as may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorage_server.budget import Budget
from moorage_server.engine import Need


def budget(capacity, **weights):
    made = Budget(capacity)
    for handle, amount in weights.items():
        made.reserve(handle, Need(amount, 0))
    return made


def test_temporaries_count_once():
    made = Budget(100)
    made.reserve("a", Need(30, 20))
    made.reserve("b", Need(20, 30))
    assert made.reserved() == 30 + 20 + 30
    assert made.reserved(without={"b"}) == 30 + 20
    assert made.fits(Need(20, 30))
    assert not made.fits(Need(20, 31))
    assert not made.fits(Need(21, 0))
    assert (made.weights("b"), made.promised("b")) == (20, 50)


def test_what_is_released_is_free_again():
    made = budget(10, a=10)
    assert not made.fits(Need(1, 0))
    made.release("a")
    made.release("a")
    assert made.reserved() == 0
    assert made.weights("a") == made.promised("a") == 0


def test_what_does_not_fit_is_never_reserved():
    made = budget(10, a=6)
    with pytest.raises(AssertionError):
        made.reserve("b", Need(5, 0))
    with pytest.raises(AssertionError):
        made.reserve("a", Need(1, 0))


@pytest.mark.parametrize(
    ("need", "candidates", "going"),
    [
        (1, "abc", []),
        (2, "abc", ["a"]),
        (4, "abc", ["b"]),  # a alone would not do, and need not go if b has to
        (5, "abc", ["a", "b"]),
        (6, "abc", ["c"]),
        (10, "abc", ["a", "b", "c"]),
        (11, "abc", None),
        (4, "cab", ["c"]),
        (8, "ab", None),
    ],
)
def test_the_least_recently_used_go_first_and_no_more_than_must(need, candidates, going):
    made = budget(10, a=1, b=3, c=5)
    assert made.victims(Need(need, 0), list(candidates)) == going


NEEDS = st.builds(Need, st.integers(0, 40), st.integers(0, 20))


@given(st.integers(1, 100), st.lists(NEEDS, max_size=8), NEEDS)
def test_victims_make_room_and_none_could_stay(capacity, held, need):
    made = Budget(capacity)
    for number, one in enumerate(held):
        if made.fits(one):
            made.reserve(str(number), one)
    candidates = [str(number) for number in range(len(held))]
    victims = made.victims(need, candidates)
    if victims is None:
        assert need.weights + need.temporaries > capacity
        return
    assert made.fits(need, victims)
    for victim in victims:
        assert not made.fits(need, [other for other in victims if other != victim])
