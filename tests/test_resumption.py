"""When a load or a watch whose connection broke is asked for again, and when it is given up."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

import moorage
from moorage.transport import LoadWatch, ModelWatch
from moorage.v1 import moorage_pb2 as pb

BROKEN = moorage.Unavailable("Socket closed")
REFUSED = moorage.Unavailable("stopping", reason="SERVER_DRAINING")
FIRST_PAUSES = [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]

#: A watch by the clock it is given, an answer, and how many breaks of any length it outlives.
LOAD = (
    lambda now: LoadWatch(lambda progress: None, now),
    pb.LoadModelResponse(progress=pb.LoadProgress()),
    5,  # it may be this load that ends the server
)
MODELS: Any = (lambda now: ModelWatch(None, now), pb.WatchModelsResponse(epoch="e"), 50)

either = pytest.mark.parametrize(
    ("make", "answer", "breaks"), [LOAD, MODELS], ids=["load", "models"]
)


class Clock:
    """Time that passes when it is told to."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def pauses(watch: Any, clock: Clock, call_seconds: float = 0.0) -> list[float]:
    """Every pause until the watch gives up a server that does not answer."""
    found: list[float] = []
    with suppress(moorage.Unavailable):
        while True:
            found.append(watch.pause(BROKEN))
            clock.seconds += found[-1] + call_seconds
    return found


@either
def test_a_server_may_take_ten_minutes_to_come_back(
    make: Callable[[Clock], Any], answer: Any, breaks: int
) -> None:
    clock = Clock()
    watch = make(clock)
    for _ in range(2):
        watch.see(answer)
        clock.seconds += 3600.0  # in which all was well
        found = pauses(watch, clock)
        assert found[:7] == FIRST_PAUSES
        assert set(found[7:]) == {5.0}
        assert 600.0 <= sum(found) < 605.0
    watch.see(answer)
    assert sum(pauses(watch, clock, call_seconds=20.0)) < 130.0  # the calls' time counts as well


@either
def test_a_server_that_never_answered_is_not_waited_for(
    make: Callable[[Clock], Any], answer: Any, breaks: int
) -> None:
    with pytest.raises(moorage.Unavailable) as caught:
        make(Clock()).pause(BROKEN)
    assert caught.value is BROKEN


@either
def test_a_server_that_stops_says_that_another_comes(
    make: Callable[[Clock], Any], answer: Any, breaks: int
) -> None:
    stopping = moorage.Unavailable("stopping", reason="SERVER_DRAINING", retry_after=5.0)
    assert make(Clock()).pause(stopping) == 0.25


@either
def test_what_the_server_refuses_is_not_asked_for_again(
    make: Callable[[Clock], Any], answer: Any, breaks: int
) -> None:
    watch = make(Clock())
    watch.see(answer)
    assert watch.pause(BROKEN) == 0.25
    with pytest.raises(moorage.Unavailable) as caught:
        watch.pause(REFUSED)
    assert caught.value is REFUSED


@either
def test_how_many_breaks_are_outlived(
    make: Callable[[Clock], Any], answer: Any, breaks: int
) -> None:
    watch = make(Clock())
    for _ in range(breaks):
        watch.see(answer)
        assert [watch.pause(BROKEN) for _ in range(7)] == FIRST_PAUSES
    if breaks == 5:
        watch.see(answer)
        with pytest.raises(moorage.Unavailable):
            watch.pause(BROKEN)
