"""Leases: how long they last, who may renew them, and what ends them."""

import pytest

from moorage_server.errors import ServerError
from moorage_server.leases import MAX_SECONDS, LeaseTable


class Clock:
    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def table(clock):
    return LeaseTable(clock)


def reason(call, *arguments):
    with pytest.raises(ServerError) as caught:
        call(*arguments)
    return caught.value.reason


def test_a_lease_lasts_its_time_and_no_longer(table, clock):
    lease = table.take("h", "run 1", 60.0)
    assert (lease.handle, lease.client, lease.seconds, lease.expires) == ("h", "run 1", 60, 1060)
    clock.time += 59.9
    assert table.of("h") == [lease]
    assert table.seconds_left(lease) == pytest.approx(0.1)
    clock.time += 0.1
    assert table.of("h") == []
    assert reason(table.renew, lease.id) == "LEASE_UNKNOWN"
    assert reason(table.release, lease.id) == "LEASE_UNKNOWN"


def test_a_renewed_lease_lasts_as_long_again(table, clock):
    lease = table.take("h", "", 60.0)
    clock.time += 59
    assert table.renew(lease.id).expires == clock.time + 60
    clock.time += 59
    assert [held.id for held in table.of("h")] == [lease.id]


def test_leases_are_apart(table):
    ours, theirs, other = (
        table.take("h", "a", 9.0),
        table.take("h", "b", 9.0),
        table.take("g", "a", 9.0),
    )
    assert len({ours.id, theirs.id, other.id}) == 3
    assert min(len(x.id) for x in (ours, theirs, other)) == 32  # nobody guesses it
    assert table.release(ours.id) == ours
    assert table.of("h") == [theirs]
    table.drop("h", unloaded=True)
    assert (table.of("h"), table.of("g")) == ([], [other])


@pytest.mark.parametrize("seconds", [0.0, -1.0, MAX_SECONDS + 1, float("nan"), float("inf")])
def test_a_duration_that_cannot_be_is_refused(table, seconds):
    assert reason(table.take, "h", "a", seconds) == "INVALID_REQUEST"
    assert table.of("h") == []


def test_an_unknown_lease_says_what_to_do(table):
    with pytest.raises(ServerError, match="load the model again"):
        table.renew("0" * 32)


def test_the_holder_of_a_lease_learns_that_its_model_was_unloaded(table):
    lease = table.take("h", "a", 9.0)
    table.drop("h", unloaded=True)
    with pytest.raises(ServerError, match="was unloaded") as caught:
        table.renew(lease.id)
    assert (caught.value.reason, caught.value.details) == ("LEASE_UNKNOWN", {"ended": "unloaded"})


def test_what_has_expired_is_told_once(table, clock):
    table.take("h", "a", 9.0)
    table.take("g", "a", 20.0)
    assert table.take_expired() == set()
    clock.time += 10
    assert table.of("h") == []
    assert table.take_expired() == {"h"}
    assert table.take_expired() == set()
