"""What is kept for callers that may come back, by a clock that stands still."""

from __future__ import annotations

import pytest

from moorage_server.answers import AnswerTable
from moorage_server.errors import Reason, ServerError


def table(*left: tuple[str, int, float], capacity: int = 100) -> AnswerTable[str]:
    """With what callers left: the id, the bytes and the time; the value is the id in capitals."""
    made: AnswerTable[str] = AnswerTable(capacity)
    for name, nbytes, now in left:
        made.add(name, b"f", name.upper())
        made.leave(name, nbytes, now)
    return made


def kept(made: AnswerTable[str]) -> str:
    return "".join(name for name in "abcd" if made.get(name, b"f"))


def test_it_is_found_by_its_id():
    made = table(("a", 1, 0.0))
    assert made.get("a", b"f") == "A"
    assert made.get("b", b"f") is None


def test_without_an_id_nothing_is_kept():
    made = table(("", 1, 0.0))
    assert made.get("", b"g") is None
    assert made.nbytes == 0


@pytest.mark.parametrize("left", [True, False])
def test_another_request_under_the_same_id(left):
    made = table()
    made.add("a", b"f", "A")
    if left:
        made.leave("a", 1, 0.0)
    with pytest.raises(ServerError, match="'a' was given to another request") as caught:
        made.get("a", b"g")
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_an_id_is_not_too_long():
    made = table()
    assert made.get("i" * 128, b"f") is None
    with pytest.raises(ServerError, match="129 characters; it may have 128") as caught:
        made.get("i" * 129, b"f")
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_it_is_kept_for_a_minute():
    made = table(("a", 1, 0.0), ("b", 1, 10.0))
    made.expire(59.9)
    assert kept(made) == "ab"
    made.expire(60.0)
    assert (kept(made), made.nbytes) == ("b", 1)
    made.expire(70.0)
    assert (kept(made), made.nbytes) == ("", 0)


def test_what_somebody_waits_for_is_kept():
    made = table(("a", 60, 0.0), ("b", 40, 0.0))
    made.back("a")
    assert made.nbytes == 40
    made.expire(1000.0)
    assert (kept(made), made.nbytes) == ("a", 0)
    made.leave("a", 60, 1000.0)
    made.expire(1059.0)
    assert (kept(made), made.nbytes) == ("a", 60)


def test_the_oldest_are_dropped_to_make_room():
    made = table(("a", 40, 0.0), ("b", 40, 1.0))
    made.back("a")
    made.leave("a", 40, 2.0)
    made.add("c", b"f", "C")
    assert kept(made) == "abc"
    made.leave("c", 60, 3.0)
    assert (kept(made), made.nbytes) == ("ac", 100)


def test_what_is_larger_than_all_the_room_is_not_kept():
    made = table(("a", 40, 0.0), ("b", 101, 1.0))
    assert (kept(made), made.nbytes) == ("a", 40)


def test_what_is_forgotten_counts_no_more():
    made = table(("a", 40, 0.0))
    made.drop("a")
    made.drop("a")
    made.back("a")
    assert (kept(made), made.nbytes) == ("", 0)
