"""One request over as many calls as it takes: no I/O, no sleep, no clock but the test's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moorage
from moorage.attempts import ForwardWatch
from moorage.v1 import moorage_pb2 as pb
from test_client import parts

REQUEST = pb.ForwardRequest(
    handle="a1b2",
    token_ids=range(5),
    row_lengths=[3, 2],
    outputs={"names": ["logits", "top_k"]},
    request_id="r1",
)
LOGITS = np.arange(20, dtype=np.float32).reshape(5, 4)
IDS = np.arange(10, dtype=np.int32).reshape(5, 2) + 300
TENSORS = {"logits": LOGITS, "top_k_ids": IDS, "top_k_logprobs": -IDS.astype(np.float32)}
BYTES = 80 + 40 + 40
BROKEN = moorage.Unavailable("Socket closed")


class Clock:
    """Time that passes when it is told to."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def watching(
    clock: Clock | None = None, *, left: float = math.inf, answered: bool = False, chance: float = 0
) -> ForwardWatch:
    clock = clock or Clock()
    request = pb.ForwardRequest.FromString(REQUEST.SerializeToString())
    return ForwardWatch(
        request, clock.seconds + left, answered=answered, now=clock, chance=lambda: chance
    )


def resumed(received: int, chunk: int) -> Iterator[pb.ForwardResponse]:
    """What a right server sends to a caller that has so many bytes."""
    header, *chunks = parts(chunk=1, **TENSORS)
    yield header
    rest = chunks[received:]
    while rest:
        run = [c.chunk for c in rest[:chunk] if c.chunk.tensor == rest[0].chunk.tensor]
        data = b"".join(piece.data for piece in run)
        whole = parts(chunk=len(data), x=np.frombuffer(data, np.uint8))[1]
        whole.chunk.tensor, whole.chunk.offset = run[0].tensor, run[0].offset
        yield whole
        rest = rest[len(run) :]


def is_whole(watch: ForwardWatch) -> None:
    found = watch.scores()
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(np.concatenate(found.tensors[name]), values)
        assert found.tensors[name][0].dtype == values.dtype
        assert [len(array) for array in found.tensors[name]] == [3, 2]


@settings(deadline=None)
@given(st.data())
def test_a_connection_may_break_anywhere(data):
    """The bytes that came count, each is asked for once, and the answer is the same."""
    watch, received = watching(), 0
    for _ in range(data.draw(st.integers(0, 6), "breaks")):
        request, _ = watch.begin()
        assert (request.request_id, request.received_bytes) == ("r1", received)
        answer = list(resumed(received, data.draw(st.integers(1, 50), "chunk")))
        for _ in range(data.draw(st.integers(0, 2), "heartbeats")):
            watch.see(pb.ForwardResponse(progress=pb.ForwardProgress()))
        for response in answer[: data.draw(st.integers(1, len(answer)), "messages")]:
            watch.see(response)
            received += len(response.chunk.data)
        assert watch.complete == (received == BYTES)
        watch.pause(BROKEN)
        if watch.complete:
            break
    else:
        for response in resumed(watch.begin()[0].received_bytes, 7):
            watch.see(response)
    is_whole(watch)


def test_it_is_not_complete_before_its_last_byte():
    watch = watching()
    assert not watch.complete
    watch.begin()
    *most, last = resumed(0, 64)
    for response in most:
        watch.see(response)
        assert not watch.complete
    with pytest.raises(moorage.DataLoss, match="ended after 120 of 160 bytes"):
        watch.scores()
    watch.see(last)
    assert watch.complete


def test_a_complete_answer_is_kept_though_its_call_fails():
    clock = Clock()
    watch = watching(clock, left=1)
    watch.begin()
    for response in resumed(0, 64):
        watch.see(response)
    clock.seconds += 2
    assert watch.pause(BROKEN) == 0
    is_whole(watch)


def see_damage(watch: ForwardWatch, received: int) -> moorage.Error:
    """Lets a call bring the header, 16 good bytes and damaged ones."""
    assert watch.begin()[0].received_bytes == received
    header, good, bad, *_ = resumed(received, 16)
    bad.chunk.crc32c ^= 1
    watch.see(header)
    watch.see(good)
    with pytest.raises(moorage.DataLoss, match="CRC-32C") as caught:
        watch.see(bad)
    return caught.value


def test_damaged_bytes_are_asked_for_again_three_times():
    watch = watching()
    for received in (0, 16, 32):
        assert watch.pause(see_damage(watch, received)) == 0
    last = see_damage(watch, 48)
    with pytest.raises(moorage.DataLoss) as caught:
        watch.pause(last)
    assert caught.value is last


def test_damaged_bytes_are_not_kept():
    watch = watching()
    watch.pause(see_damage(watch, 0))
    for response in resumed(watch.begin()[0].received_bytes, 9):
        watch.see(response)
    is_whole(watch)


def test_other_data_loss_is_not_asked_for_again():
    watch = watching(answered=True)
    watch.begin()
    with pytest.raises(moorage.DataLoss) as caught:
        watch.see(list(resumed(0, 16))[1])  # no header
    with pytest.raises(moorage.DataLoss):
        watch.pause(caught.value)
    with pytest.raises(moorage.DataLoss):
        watch.pause(moorage.DataLoss("x", reason="CHECKPOINT_CORRUPT"))


def _other_shape(header: pb.ForwardHeader) -> None:
    header.tensors[0].shape[1] = 5


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (_other_shape, moorage.DataLoss, "other tensors"),
        (lambda h: h.tensors.pop(), moorage.DataLoss, "other tensors"),
        (lambda h: setattr(h, "weights_version", 2), moorage.FailedPrecondition, "was 1 and is 2"),
        (
            lambda h: setattr(h, "weights_digest", "hub:78"),
            moorage.FailedPrecondition,
            "weights changed",
        ),
        (lambda h: setattr(h, "revision", "x"), moorage.FailedPrecondition, "call forward"),
    ],
)
def test_bytes_of_different_answers_are_not_mixed(change, kind, message):
    watch = watching()
    watch.begin()
    for response in list(resumed(0, 16))[:2]:
        watch.see(response)
    watch.pause(BROKEN)
    watch.begin()
    header = next(resumed(16, 16))
    change(header.header)
    with pytest.raises(kind, match=message) as caught:
        watch.see(header)
    with pytest.raises(kind):
        watch.pause(caught.value)


@pytest.mark.parametrize("offset", [0, -80, -40])
def test_bytes_of_a_later_tensor_do_not_come_early(offset):
    watch = watching()
    watch.begin()
    header, chunk, *_ = resumed(0, 16)
    watch.see(header)
    chunk.chunk.tensor, chunk.chunk.offset = 1, offset
    with pytest.raises(moorage.DataLoss, match="tensor 1 came, after 0 bytes"):
        watch.see(chunk)


def test_no_two_tensors_have_one_name():
    watch = watching()
    watch.begin()
    header = next(resumed(0, 16))
    header.header.tensors[2].name = "top_k_ids"
    with pytest.raises(moorage.DataLoss, match="the answer holds"):
        watch.see(header)


def test_a_chunk_needs_the_header_of_its_own_call():
    watch = watching()
    watch.begin()
    header, first, second, *_ = resumed(0, 16)
    watch.see(header)
    watch.see(first)
    watch.pause(BROKEN)
    watch.begin()
    with pytest.raises(moorage.DataLoss, match="unexpected"):
        watch.see(second)


def test_a_call_that_grpc_cancels_is_made_again():
    """So it does with what a server that stops has not taken yet; the server says no reason."""
    assert watching(answered=True).pause(moorage.Cancelled("CANCELLED")) == 0.25


def test_pauses_grow_until_the_server_answers_again():
    watch = watching(answered=True)
    assert [watch.pause(BROKEN) for _ in range(7)] == [0.25, 0.5, 1, 2, 4, 5, 5]
    watch.begin()
    watch.see(pb.ForwardResponse(progress=pb.ForwardProgress()))
    assert watch.pause(BROKEN) == 0.25


def test_it_is_given_up_two_minutes_after_the_last_answer():
    clock = Clock()
    watch = watching(clock, answered=True)
    watch.pause(BROKEN)
    clock.seconds += 119
    watch.pause(BROKEN)
    watch.begin()
    watch.see(pb.ForwardResponse(progress=pb.ForwardProgress()))
    watch.pause(BROKEN)
    clock.seconds += 119
    watch.pause(BROKEN)
    clock.seconds += 2
    with pytest.raises(moorage.Unavailable):
        watch.pause(BROKEN)


def test_a_server_that_never_answered_is_not_waited_for():
    watch = watching()
    watch.begin()
    with pytest.raises(moorage.Unavailable):
        watch.pause(BROKEN)


BUSY = [
    moorage.ResourceExhausted("full", reason="QUEUE_FULL", retry_after=2.0),
    moorage.Unavailable("stopping", reason="SERVER_DRAINING", retry_after=2.0),
]


@pytest.mark.parametrize("error", BUSY)
@pytest.mark.parametrize(("chance", "seconds"), [(0.0, 2.0), (0.5, 2.2), (1.0, 2.4)])
def test_a_busy_server_says_when_to_come_back(error, chance, seconds):
    watch = watching(chance=chance)
    for _ in range(50):
        assert watch.pause(error) == pytest.approx(seconds)


@pytest.mark.parametrize("error", BUSY)
def test_a_busy_server_has_answered(error):
    watch = watching()
    watch.pause(error)
    assert watch.pause(BROKEN) == 0.25


@pytest.mark.parametrize(
    "error",
    [
        moorage.ResourceExhausted("full", reason="QUEUE_FULL"),
        moorage.Unavailable("stopping", reason="SERVER_DRAINING"),
        moorage.ResourceExhausted("full", reason="DEVICE_BUDGET_EXCEEDED", retry_after=1.0),
        moorage.DeadlineExceeded("late", reason="DEADLINE_TOO_SHORT"),
        moorage.DeadlineExceeded("late"),
        moorage.Cancelled("cancelled", reason="LOAD_CANCELLED"),
        moorage.InternalError("bug", code=grpc.StatusCode.UNKNOWN),
        moorage.NotFound("gone", reason="MODEL_NOT_LOADED"),
    ],
)
def test_other_errors_are_raised(error):
    with pytest.raises(moorage.Error) as caught:
        watching(answered=True).pause(error)
    assert caught.value is error


def test_each_call_has_what_is_left_of_the_time():
    clock = Clock()
    watch = watching(clock, left=10, answered=True)
    assert watch.begin()[1] == 10
    clock.seconds += 4
    assert watch.pause(BROKEN) == 0.25
    assert watch.begin()[1] == 6
    clock.seconds += 7
    with pytest.raises(moorage.DeadlineExceeded, match="longer timeout"):
        watch.begin()
    assert watching().begin()[1] is None


@pytest.mark.parametrize(("error", "enough"), [(BROKEN, 0.26), (BUSY[0], 2.1)])
def test_nothing_is_waited_for_that_comes_too_late(error, enough):
    assert watching(left=enough, answered=True).pause(error) > 0
    with pytest.raises(moorage.Error) as caught:
        watching(left=enough - 0.1, answered=True).pause(error)
    assert caught.value is error
