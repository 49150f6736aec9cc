"""Who runs next: shares, order and room, with rows that cost nothing."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorage_models.checkpoint import Checkpoint
from moorage_server.engine import Bucket
from moorage_server.fair_queue import FairQueue
from moorage_server.jobs import Job
from moorage_server.model import Model
from moorage_server.requests import Wanted
from moorage_server.rows import make_rows
from moorage_server.scoring import make_work
from test_scoring import CONFIG, served

BUCKETS = (Bucket(128, 1), Bucket(128, 4), Bucket(512, 1), Bucket(512, 2))
SHORT, LONG = 5, 200  # tokens, padded to 128 and to 512
BATCH = 2 * 512  # tokens of the largest bucket
MODELS = {
    handle: Model(handle, mock.create_autospec(Checkpoint, instance=True), lambda model: None)
    for handle in ("m", "n")
}


def job(client: str, *lengths: int, handle: str = "m", layer: int | None = None) -> Job:
    rows = make_rows([1] * sum(lengths), lengths, [])
    wanted = Wanted(("hidden",), layer=layer)
    return Job(
        MODELS[handle], client, make_work(rows, wanted, CONFIG, BUCKETS, served(CONFIG)), BUCKETS
    )


def queue_of(*jobs: Job, capacity: int = 1 << 30) -> FairQueue:
    queue = FairQueue(capacity)
    for one in jobs:
        queue.add(one)
    return queue


def picked(queue: FairQueue, times: int) -> Counter[str]:
    """How many tokens each client was given by the next picks."""
    had: Counter[str] = Counter()
    for _ in range(times):
        pick = queue.pick()
        assert pick
        for one in pick.jobs:
            had[one.client] += pick.bucket.length
    return had


# Shares.


def test_clients_have_equal_shares_however_many_requests_they_sent():
    greedy = [job("greedy", *[SHORT] * 50) for _ in range(9)]
    queue = queue_of(*greedy, job("modest", *[SHORT] * 50))
    assert picked(queue, 20) == {"greedy": 20 * 256, "modest": 20 * 256}


def test_shares_are_counted_in_tokens():
    queue = queue_of(job("long", *[LONG] * 40), job("short", *[SHORT] * 160))
    assert picked(queue, 30) == {"long": 10 * 1024, "short": 20 * 512}


def test_a_short_request_is_not_stuck_behind_a_long_one():
    queue = queue_of(job("a", *[SHORT] * 400), job("b", *[SHORT] * 400))
    picked(queue, 7)
    own, other = job("a", SHORT), job("c", SHORT)
    queue.add(own)
    queue.add(other)
    assert picked(queue, 1)["c"] == 128
    assert (other.rows_left, own.rows_left) == (1, 1)  # it runs; and waits
    picked(queue, 1)
    assert not own.waiting


def test_requests_of_a_client_end_one_after_another():
    queue = queue_of(*(asked := [job("a", *[SHORT] * 40) for _ in range(3)]))
    picked(queue, 15)
    assert [sum(map(len, one.waiting.values())) for one in asked] == [0, 20, 40]


def test_a_long_request_is_not_stuck_behind_many_short_ones():
    """Its turn comes when it would have ended, had it had an equal share."""
    long = job("a", *[SHORT] * 40)
    queue = queue_of(long)
    for _ in range(40):
        queue.add(job("a", *[SHORT] * 4))
        picked(queue, 1)
    assert not long.waiting


def test_a_short_request_is_not_stuck_behind_long_rows():
    queue = queue_of(job("a", *[LONG] * 400))
    picked(queue, 7)
    short = job("a", SHORT)
    queue.add(short)
    picked(queue, 2)
    assert not short.waiting


def test_who_comes_late_has_no_back_pay():
    queue = queue_of(job("early", *[SHORT] * 400))
    picked(queue, 50)
    queue.add(job("late", *[SHORT] * 400))
    assert picked(queue, 10) == {"early": 10 * 256, "late": 10 * 256}


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_what_ran_before_the_queue_was_empty_is_no_debt(order):
    queue = queue_of(job("a", *[SHORT] * 400))
    picked(queue, 100)
    assert queue.pick() is None
    for client in order:
        queue.add(job(client, *[SHORT] * 400))
    assert picked(queue, 10) == {"a": 10 * 256, "b": 10 * 256}


def test_who_leaves_and_comes_back_keeps_its_debt():
    leaving = job("a", *[LONG] * 40)
    queue = queue_of(leaving, job("b", *[SHORT] * 400))
    assert picked(queue, 1) == {"a": 1024}
    queue.remove(leaving)
    queue.add(leaving)
    assert picked(queue, 2) == {"b": 2 * 512}


def test_a_request_that_was_put_aside_waits_for_what_is_left_of_it():
    aside, latest = job("a", *[SHORT] * 400), job("a", *[SHORT] * 400)
    queue = queue_of(aside)
    picked(queue, 50)
    queue.remove(aside)
    for one in (latest, aside):
        queue.add(one)
    picked(queue, 50)
    assert (len(latest.waiting[128]), aside.waiting) == (400, {})


def test_nobody_rides_along_so_often_that_others_wait():
    """Beside each long row of a newcomer there is a place for one of "a", whose turn it is not."""
    kinds = [("m", None), ("m", 1), ("n", None)]
    queue = queue_of(job("b", *[SHORT] * 2000))
    for handle, layer in kinds:
        queue.add(job("a", *[LONG] * 200, handle=handle, layer=layer))
    had: Counter[str] = Counter()
    for i in range(40):
        for handle, layer in kinds:
            queue.add(job(f"{i} {handle} {layer}", LONG, handle=handle, layer=layer))
        had += picked(queue, 4)
        assert abs(had["a"] - had["b"]) <= BATCH + 512


def test_places_that_are_left_go_to_others():
    queue = queue_of(job("a", SHORT), job("b", SHORT, SHORT, LONG), job("c", SHORT, handle="n"))
    assert picked(queue, 1) == {"a": 128, "b": 256}
    assert [queue.pick().bucket for _ in range(2)] == [Bucket(128, 1), Bucket(512, 1)]  # type: ignore[union-attr]


# Room.


def test_who_has_nothing_waiting_may_bring_anything_while_something_is_free():
    queue = queue_of(capacity=3 * 128)
    assert queue.excess("a", 1 << 40) == 0
    queue.add(job("a", SHORT, SHORT))
    assert queue.excess("a", 128) == 2 * 128
    assert queue.excess("a", 1 << 40) == 2 * 128  # then nothing waits
    assert queue.excess("b", 1 << 40) == 0
    queue.add(job("b", SHORT))
    assert queue.excess("c", 128) == 1
    queue.pick()
    assert queue.excess("c", 1 << 40) == 0


def test_a_greedy_client_leaves_room_for_others():
    queue, taken = queue_of(capacity=100 * 128), 0
    while queue.excess("greedy", 128) == 0:
        queue.add(job("greedy", SHORT))
        taken += 1
    assert taken == 50
    assert queue.excess("greedy", 128) == 128
    queue.add(job("modest", *[SHORT] * 20))
    assert queue.excess("modest", 10 * 128) == 0
    assert queue.excess("modest", 13 * 128) == 3 * 128


def test_how_much_is_ahead():
    queue = queue_of(job("a", *[SHORT] * 100), job("b", *[SHORT] * 3), job("c", SHORT))
    assert queue.ahead_of(job("d", SHORT, SHORT)) == (2 + 2 + 2 + 1) * 128
    assert queue.ahead_of(job("a", SHORT)) == (1 + 1 + 1) * 128
    assert queue.ahead_of(job("a", *[SHORT] * 100)) == (200 + 3 + 1) * 128
    assert queue_of().ahead_of(job("a", LONG)) == 512


def test_rows_of_which_nothing_is_wanted_do_not_wait():
    nothing = job("a", SHORT)
    nothing.waiting.clear()
    nothing.tokens = 0
    queue = queue_of(nothing)
    assert queue.pick() is None
    queue.remove(nothing)
    assert queue.tokens == 0


# Any order of events.

LENGTHS = st.lists(st.sampled_from([SHORT, LONG]), min_size=1, max_size=12)
KINDS = st.sampled_from([("m", None), ("m", 1), ("n", None)])
ADD = st.tuples(st.just("add"), st.sampled_from("abcd"), LENGTHS, KINDS)
PICK = st.just(("pick",))
AGAIN = st.tuples(st.sampled_from(["remove", "add again"]), st.integers(0, 30))


class Backlogged:
    """How far apart the service of two clients has been, while rows of both have waited."""

    def __init__(self) -> None:
        self._spans: dict[tuple[str, str], list[int]] = {}

    def check(self, waiting: set[str], had: Counter[str]) -> None:
        for pair in combinations("abcd", 2):
            if not waiting.issuperset(pair):
                self._spans.pop(pair, None)
                continue
            apart = had[pair[0]] - had[pair[1]]
            least, most = self._spans.get(pair, (apart, apart))
            self._spans[pair] = [min(least, apart), max(most, apart)]
            assert max(most, apart) - min(least, apart) <= 2 * (BATCH + 512)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(ADD, ADD, PICK), max_size=60), st.integers(1, 40 * 128))
def test_what_waits_is_bounded_and_nobody_is_refused_for_ever(events, capacity):
    """A refused client has something waiting, or finds a full queue; both pass."""
    queue, refused = FairQueue(capacity), []
    for name, *what in events:
        if name == "pick":
            queue.pick()
            continue
        client, lengths, (handle, layer) = what
        asked = job(client, *lengths, handle=handle, layer=layer)
        own, full = queue.tokens_of(client), queue.tokens >= capacity
        if queue.excess(client, asked.tokens):
            assert own or full
            refused.append(asked)
        else:
            assert not full
            queue.add(asked)
            assert not own or queue.tokens + own <= capacity
    while queue.pick():
        pass
    assert not any(queue.excess(asked.client, asked.tokens) for asked in refused)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(ADD, PICK, PICK, PICK, AGAIN, AGAIN), max_size=60))
def test_any_order_of_events(events):
    queue, jobs, ran = FairQueue(1 << 30), [], Counter()
    inside: set[int] = set()
    had: Counter[str] = Counter()
    backlogged = Backlogged()
    for name, *what in [*events, *[("pick",)] * 250]:
        if name == "add":
            client, lengths, (handle, layer) = what
            jobs.append(job(client, *lengths, handle=handle, layer=layer))
            queue.add(jobs[-1])
            inside.add(len(jobs) - 1)
        elif name != "pick" and jobs:
            number = what[0] % len(jobs)
            if name == "remove":
                queue.remove(jobs[number])
                inside.discard(number)
            elif number not in inside:
                queue.add(jobs[number])
                inside.add(number)
        elif name == "pick" and (pick := queue.pick()):
            shapes = {one.shape(pick.bucket.length) for one in pick.jobs}
            assert len(shapes) == 1
            assert len(pick.pieces) <= pick.bucket.rows
            assert pick.tokens == len(pick.pieces) * pick.bucket.length
            for one, piece in zip(pick.jobs, pick.pieces, strict=True):
                assert piece.work is one.work
                assert piece.length <= pick.bucket.length
                ran[one, piece.row] += 1
                had[one.client] += pick.bucket.length
        inside = {number for number in inside if jobs[number].waiting}
        waiting = [jobs[number] for number in inside]
        padded = [len(r) * length for one in waiting for length, r in one.waiting.items()]
        assert queue.tokens == sum(padded) == sum(queue.tokens_of(client) for client in "abcd")
        assert queue.tokens or queue.excess("a", 1 << 40) == 0
        backlogged.check({one.client for one in waiting}, had)
    assert queue.pick() is None
    assert set(ran.values()) <= {1}
    for one in jobs:  # all ran but what was taken out
        left = [row for rows in one.waiting.values() for row in rows]
        rows = [row for other, row in ran if other is one]
        assert sorted(left + rows) == list(range(len(one.work.rows.lengths)))


# The bucket.


@pytest.mark.parametrize(
    ("waiting", "seconds", "wanted"),
    [
        (3, {}, 4),  # nothing is known yet
        (3, {1: 1.0}, 4),  # nor whether the larger one is quicker
        (3, {1: 1.0, 4: 2.9}, 4),
        (3, {1: 1.0, 4: 3.1}, 1),
        (4, {1: 1.0, 4: 3.9}, 4),
        (9, {1: 1.0, 4: 4.1}, 1),
        (1, {1: 1.0, 4: 0.1}, 1),  # as it would be without the others
    ],
)
def test_rows_run_in_the_bucket_that_is_quickest_by_what_it_took(
    waiting: int, seconds: dict[int, float], wanted: int
):
    queue = (
        queue_of(job("a", *[SHORT] * (waiting - 1)), job("b", SHORT))
        if waiting > 1
        else (queue_of(job("a", SHORT)))
    )
    pick = queue.pick(lambda handle, bucket: seconds.get(bucket.rows) if handle == "m" else None)
    assert pick
    assert (pick.bucket, len(pick.pieces)) == (Bucket(128, wanted), min(waiting, wanted))
    assert queue.tokens == 128 * (waiting - len(pick.pieces))
