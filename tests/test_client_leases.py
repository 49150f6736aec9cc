"""Leases and watching, of both clients, against a server in this process that answers by script."""

import asyncio
import getpass
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import aclosing, asynccontextmanager

import grpc
import pytest

import moorage
from moorage import renewal, requests, transport
from moorage.leases import Leases
from moorage.v1 import moorage_pb2 as pb
from test_client import fail, progress, serving

UNAVAILABLE, NOT_FOUND = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND


class Awaitable:
    """The blocking client behind the asyncio client's signatures."""

    def __init__(self, client: moorage.Client) -> None:
        self.lease = client.lease
        self._client = client

    def __getattr__(self, name):
        async def call(*arguments, **options):
            return getattr(self._client, name)(*arguments, **options)

        return call

    async def watch(self):
        for change in self._client.watch():
            yield change


@asynccontextmanager
async def blocking(address):
    with moorage.connect(address, timeout=20.0) as client:
        yield Awaitable(client)


@pytest.fixture(params=[blocking, moorage.aio.connect], ids=["blocking", "asyncio"])
def play(request):
    """Plays a scenario with a new client, of either kind, and closes the client."""

    def play(address, scenario):
        async def run():
            async with request.param(address) as client:
                result = await scenario(client)
            left = {thread.name for thread in threading.enumerate()}
            left |= {task.get_name() for task in asyncio.all_tasks()}
            assert "moorage leases" not in left
            return result

        return asyncio.run(run())

    return play


@pytest.fixture(autouse=True)
def patient_but_quick(monkeypatch):
    monkeypatch.setattr(transport, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(renewal, "RELEASE_TIMEOUT", 20.0)


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.002)


def lease_of(number: int, seconds: float = 0.06, left: float = 3600.0) -> pb.Lease:
    """A lease that is renewed every 20 ms, but does not expire in a slow test."""
    lease = pb.Lease(id=f"lease {number}", client="run 7")
    lease.duration.FromMilliseconds(int(seconds * 1000))
    lease.time_left.FromMilliseconds(int(left * 1000))
    return lease


class Desk:
    """A server that gives leases: 1, 2, 3, ...; the model is the one that is asked for."""

    def __init__(self) -> None:
        self.given = 0
        self.known: set[str] = set()
        self.renewed: list[str] = []
        self.released: list[str] = []
        self.loads: list[pb.LoadModelRequest] = []

    def script(self, **other):
        return {"LoadModel": self.load, "RenewLease": self.renew, "ReleaseLease": self.release} | (
            other
        )

    def load(self, request, context):
        self.loads.append(request)
        yield progress(1, 2)
        model = pb.Model(handle=request.model.model_id, state=pb.MODEL_STATE_READY)
        yield pb.LoadModelResponse(model=model, lease=self.take() if request.lease.client else None)

    def take(self):
        self.given += 1
        self.known.add(f"lease {self.given}")
        return lease_of(self.given)

    def renew(self, request, context):
        self.renewed.append(request.lease_id)
        if request.lease_id not in self.known:
            fail(context, NOT_FOUND, "expired", "LEASE_UNKNOWN")
        return pb.RenewLeaseResponse(lease=lease_of(int(request.lease_id.split()[1])))

    def release(self, request, context):
        if request.lease_id not in self.known:
            fail(context, NOT_FOUND, "expired", "LEASE_UNKNOWN")
        self.known.remove(request.lease_id)
        self.released.append(request.lease_id)
        return pb.ReleaseLeaseResponse()


# Renewing, over the wire.


def test_a_lease_is_renewed_until_it_is_released(play):
    desk = Desk()

    async def scenario(client):
        model = await client.load("m", lease=90.5, client_name="run 7", cancel_if_abandoned=True)
        await until(lambda: len(desk.renewed) >= 3)
        held = model.lease
        await client.release(model)
        assert (model.lease, client.lease("m")) == (None, None)
        count = len(desk.renewed)
        await asyncio.sleep(0.15)
        assert len(desk.renewed) <= count + 1  # the one that was on its way
        return held

    with serving(**desk.script()) as fake:
        held = play(fake.address, scenario)
    (request,) = desk.loads
    assert (request.lease.client, request.lease.duration.ToMilliseconds()) == ("run 7", 90_500)
    assert request.cancel_if_abandoned
    assert set(desk.renewed) == {"lease 1"}
    assert desk.released == ["lease 1"]
    assert (held.id, held.client, held.seconds) == ("lease 1", "run 7", 0.06)
    assert 3500 < held.seconds_left < 3600


def test_a_load_without_a_lease_takes_none(play):
    desk = Desk()

    async def scenario(client):
        return (await client.load("m")).lease

    with serving(**desk.script()) as fake:
        assert play(fake.address, scenario) is None
    assert not desk.loads[0].HasField("lease")
    assert not desk.loads[0].cancel_if_abandoned
    assert desk.renewed == desk.released == []


def test_closing_releases_every_lease(play):
    desk = Desk()

    async def scenario(client):
        for name in ("a", "b", "c"):
            await client.load(name, lease=60)

    with serving(**desk.script()) as fake:
        play(fake.address, scenario)
    assert desk.released == ["lease 1", "lease 2", "lease 3"]


def test_a_second_lease_on_a_model_replaces_the_first(play):
    desk = Desk()

    async def scenario(client):
        await client.load("m", lease=60)
        model = await client.load("m", lease=60)
        assert model.lease.id == "lease 2"
        assert desk.released == ["lease 1"]
        await until(lambda: desk.renewed.count("lease 2") >= 2)

    with serving(**desk.script()) as fake:
        play(fake.address, scenario)
    assert desk.released == ["lease 1", "lease 2"]
    assert len(desk.loads) == 2


def test_a_lost_lease_is_taken_again_with_the_model(play, caplog):
    desk = Desk()

    async def scenario(client):
        model = await client.load("m", revision="r", lease=60, client_name="run 7")
        desk.known.clear()  # as after a restart
        await until(lambda: desk.renewed.count("lease 2") >= 2)
        return model.lease.id

    with serving(**desk.script()) as fake:
        assert play(fake.address, scenario) == "lease 2"
    first, second = desk.loads
    assert first == second
    assert desk.released == ["lease 2"]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "the lease on m is gone (expired); the model is loaded again"
    ]


def test_a_lease_outlives_a_restart_of_the_server(play):
    before, after = Desk(), Desk()
    after.given = 7

    async def scenario(client):
        model = await client.load("m", lease=60)
        await until(lambda: before.renewed)
        first.server.stop(0).wait()
        with serving(int(first.address.rpartition(":")[2]), **after.script()):
            await until(lambda: after.renewed.count("lease 8") >= 2)
            assert model.lease.id == "lease 8"
            await client.release(model)

    with serving(**before.script()) as first:
        play(first.address, scenario)
    assert after.loads == before.loads
    assert after.released == ["lease 8"]


@pytest.mark.parametrize("code", [UNAVAILABLE, grpc.StatusCode.INTERNAL])
def test_a_failed_renewal_is_logged_once_and_tried_again(play, caplog, code):
    desk, failures = Desk(), []

    def renew(request, context):
        if len(failures) < 3:
            failures.append(request)
            fail(context, code, "no luck", "SERVER_DRAINING")
        return desk.renew(request, context)

    async def scenario(client):
        await client.load("m", lease=60)
        await until(lambda: len(desk.renewed) >= 2)

    with serving(**desk.script(RenewLease=renew)) as fake:
        play(fake.address, scenario)
    assert len(failures) == 3
    assert len(desk.loads) == 1
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "the lease on m is not renewed (no luck); trying again"
    ]


@pytest.mark.parametrize("ending", ["refused", "without a model"])
def test_a_failed_reload_is_tried_again(play, ending):
    desk, failures = Desk(), []

    def load(request, context):
        if desk.given and len(failures) < 2:
            failures.append(request)
            yield progress(1, 2)
            if ending == "refused":
                code = grpc.StatusCode.RESOURCE_EXHAUSTED
                fail(context, code, "full", "DEVICE_BUDGET_EXCEEDED")
            return
        yield from desk.load(request, context)

    async def scenario(client):
        model = await client.load("m", lease=60)
        desk.known.clear()
        await until(lambda: len(failures) == 2)
        await until(lambda: model.lease)
        return model.lease.id

    with serving(**desk.script(LoadModel=load)) as fake:
        assert play(fake.address, scenario) == "lease 2"


def test_other_leases_are_renewed_while_a_model_is_loaded_again(play):
    desk = Desk()

    def load(request, context):
        start = len(desk.renewed)
        while len(desk.loads) >= 2 and desk.renewed[start:].count("lease 2") < 3:
            yield progress(1, 2)
            time.sleep(0.005)
        yield from desk.load(request, context)

    async def scenario(client):
        a, b = await client.load("a", lease=60), await client.load("b", lease=60)
        desk.known.discard("lease 1")
        await until(lambda: a.lease and a.lease.id == "lease 3")
        assert b.lease.id == "lease 2"

    with serving(**desk.script(LoadModel=load)) as fake:
        play(fake.address, scenario)
    assert [request.model.model_id for request in desk.loads] == ["a", "b", "a"]


def test_a_lease_that_is_released_while_it_is_taken_again_does_not_stay(play):
    desk, reloading, go_on = Desk(), threading.Event(), threading.Event()

    def load(request, context):
        if desk.given:
            reloading.set()
            go_on.wait(10)
        yield from desk.load(request, context)

    async def scenario(client):
        model = await client.load("m", lease=60)
        desk.known.clear()
        await until(reloading.is_set)
        await client.release(model)
        go_on.set()
        await until(lambda: desk.released)
        assert model.lease is None

    with serving(**desk.script(LoadModel=load)) as fake:
        play(fake.address, scenario)
    assert desk.released == ["lease 2"]


@pytest.mark.parametrize("method", ["RenewLease", "LoadModel"])
def test_closing_waits_for_no_call_in_the_background(play, monkeypatch, method):
    monkeypatch.setattr(renewal, "RENEW_TIMEOUT", 60.0)
    desk, hanging, go_on = Desk(), threading.Event(), threading.Event()

    def renew(request, context):
        if method == "RenewLease":
            hanging.set()
            go_on.wait(15)
        desk.known.clear()
        return desk.renew(request, context)

    def load(request, context):
        if desk.given:
            hanging.set()
            go_on.wait(15)
        yield from desk.load(request, context)

    async def scenario(client):
        await client.load("m", lease=60)
        await until(hanging.is_set)
        return time.monotonic()

    with serving(**desk.script(RenewLease=renew, LoadModel=load)) as fake:
        seconds = time.monotonic() - play(fake.address, scenario)
        go_on.set()
    assert seconds < 10


def test_closing_without_a_server_raises_nothing(play):
    desk = Desk()

    async def scenario(client):
        await client.load("m", lease=60)
        fake.server.stop(0).wait()

    with serving(**desk.script()) as fake:
        play(fake.address, scenario)
    assert desk.released == []


def test_between_renewals_nothing_runs(play, monkeypatch):
    desk, looks, wait = Desk(), [], Leases.wait
    monkeypatch.setattr(Leases, "wait", lambda leases: looks.append(1) or wait(leases))

    async def scenario(client):
        await client.load("m", lease=60)
        await asyncio.sleep(0.2)

    with serving(**desk.script()) as fake:
        play(fake.address, scenario)
    assert 1 <= len(looks) < 100  # about ten


# Releasing and unloading.


def test_a_release_of_what_is_not_leased_is_no_error(play):
    desk, renewed = Desk(), pb.RenewLeaseResponse(lease=lease_of(1))

    async def scenario(client):
        await client.release("never leased")
        await client.load("m", lease=3600)
        desk.known.clear()
        await client.release("m")

    with serving(**desk.script(RenewLease=lambda *_: renewed)) as fake:
        play(fake.address, scenario)
    assert desk.released == []


def test_a_release_that_fails_says_so_and_renews_no_more(play):
    desk = Desk()

    def release(request, context):
        fail(context, grpc.StatusCode.INTERNAL, "a bug", "INTERNAL")

    async def scenario(client):
        model = await client.load("m", lease=60)
        with pytest.raises(moorage.InternalError, match="a bug"):
            await client.release(model)
        assert model.lease is None

    with serving(**desk.script(ReleaseLease=release)) as fake:
        play(fake.address, scenario)


def test_unload_names_its_own_lease_which_ends(play):
    desk, unloads = Desk(), []

    def unload(request, context):
        unloads.append(request)
        desk.known.clear()
        time.sleep(0.1)  # long enough for a renewal, which would load the model again
        return pb.UnloadModelResponse()

    async def scenario(client):
        model = await client.load("m", lease=60)
        await client.unload(model)
        await client.unload("other", force=True)
        assert model.lease is None
        await asyncio.sleep(0.1)

    with serving(**desk.script(UnloadModel=unload)) as fake:
        play(fake.address, scenario)
    assert unloads == [
        pb.UnloadModelRequest(handle="m", lease_id="lease 1"),
        pb.UnloadModelRequest(handle="other", force=True),
    ]
    assert len(desk.loads) == 1


def test_a_refused_unload_leaves_the_lease(play):
    desk = Desk()

    def unload(request, context):
        time.sleep(0.05)  # meanwhile nothing is due, and who renews sleeps
        fail(context, grpc.StatusCode.FAILED_PRECONDITION, "leased by run 8", "MODEL_LEASED")

    async def scenario(client):
        model = await client.load("m", lease=60)
        with pytest.raises(moorage.FailedPrecondition, match="leased by run 8") as caught:
            await client.unload(model)
        assert caught.value.reason == "MODEL_LEASED"
        assert model.lease.id == "lease 1"
        count = len(desk.renewed)
        await until(lambda: len(desk.renewed) >= count + 3)

    with serving(**desk.script(UnloadModel=unload)) as fake:
        play(fake.address, scenario)
    assert desk.released == ["lease 1"]


# Asking for a lease.


@pytest.mark.parametrize("lease", [0, -1, 1e-10, float("nan"), float("inf"), 1e300, "60"])
def test_a_lease_that_cannot_be_is_refused_before_it_is_sent(play, lease):
    async def scenario(client):
        with pytest.raises(moorage.InvalidRequest, match="lease of"):
            await client.load("m", lease=lease)

    play("127.0.0.1:1", scenario)


def test_a_client_is_named_by_user_host_and_process(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "trainer-3")
    monkeypatch.setattr(os, "getpid", lambda: 41)
    request = requests.load_model(
        pb.ModelSpec(), lease=1, client_name="", cancel_if_abandoned=False
    )
    assert request.lease.client == "ada@trainer-3 41"

    def nameless():
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert requests.default_client_name() == "unknown@trainer-3 41"


# When what is due, without a wire.

REQUEST = pb.LoadModelRequest(model=pb.ModelSpec(model_id="m"))
DOWN = moorage.Unavailable("down")
GONE = moorage.NotFound("expired", reason="LEASE_UNKNOWN")


class Book:
    """Leases, their clock, and how often they asked to be looked at."""

    def __init__(self, seconds: float = 30.0) -> None:
        self.now = 1000.0
        self.changes = 0
        self.leases = Leases(self._change, lambda: self.now)
        self.take(1, seconds)

    def _change(self) -> None:
        self.changes += 1

    def take(self, number: int, seconds: float) -> str:
        lease = lease_of(number, seconds, seconds)
        response = pb.LoadModelResponse(model=pb.Model(handle="m"), lease=lease)
        return self.leases.take(REQUEST, response)

    def due(self, *, lost: bool = False):
        (held,) = self.leases.due(lost=lost)
        return held

    def reloaded(self, held, number: int, handle: str = "m") -> str:
        lease = lease_of(number, 30, 30)
        response = pb.LoadModelResponse(model=pb.Model(handle=handle), lease=lease)
        return self.leases.reloaded(held, response)


def test_a_lease_is_due_after_a_third_of_its_time():
    book = Book()
    assert (book.changes, book.leases.wait()) == (1, 10.0)
    book.now += 9.9
    assert book.leases.due(lost=False) == []
    book.now += 0.1
    assert book.leases.wait() == 0.0
    book.leases.renewed(book.due(), lease_of(1, 30, 30))
    assert (book.leases.wait(), book.leases.of("m").seconds_left) == (10.0, 30.0)


def test_a_lease_counts_down_and_expires():
    book = Book()
    book.now += 29
    assert book.leases.of("m") == moorage.Lease("lease 1", "run 7", 30.0, 1.0)
    book.now += 1
    assert book.leases.of("m") is None
    assert book.leases.of("other") is None


@pytest.mark.parametrize(
    ("seconds", "pauses"),
    [
        (3.0, [0.25, 0.5, 1.0, 1.0]),
        (3600.0, [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]),
    ],
)
def test_pauses_double_up_to_a_third_of_the_lease(seconds, pauses):
    book = Book(seconds)
    book.now += seconds / 3
    for pause in pauses:
        book.leases.failed(book.due(), DOWN)
        assert book.leases.wait() == pytest.approx(pause)
        book.now += pause


def test_failures_that_go_on_for_years_do_not_overflow():
    book = Book()
    for _ in range(2000):
        book.now += 10
        book.leases.failed(book.due(), DOWN)


def test_a_tiny_lease_does_not_flood_the_server():
    assert Book(0.001).leases.wait() == pytest.approx(0.02)


def test_an_unknown_lease_is_lost_and_loaded_again_at_once():
    book = Book()
    book.now += 10
    book.leases.failed(book.due(), GONE)
    assert book.leases.of("m") is None
    assert book.leases.due(lost=False) == []
    assert book.due(lost=True).request == REQUEST
    assert book.leases.wait() == 0.0
    book.leases.failed(book.due(lost=True), GONE)  # no answer to a load, but no reason to hurry
    assert book.leases.wait() == 0.25
    book.now += 0.25
    assert book.reloaded(book.due(lost=True), 2) == ""
    assert book.leases.of("m").id == "lease 2"
    assert book.leases.wait() == 10.0


def test_a_lease_whose_model_was_unloaded_is_over(caplog):
    book = Book()
    book.now += 10
    unloaded = moorage.NotFound("unloaded", reason="LEASE_UNKNOWN", details={"ended": "unloaded"})
    book.leases.failed(book.due(), unloaded)
    assert (book.leases.of("m"), book.leases.wait()) == (None, None)
    assert [r.getMessage() for r in caplog.records] == ["the lease on m is over (unloaded)"]


def test_each_outage_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "moorage")
    book = Book()
    for _ in range(2):
        book.now += 10
        for _ in range(3):
            book.leases.failed(book.due(), DOWN)
            book.now += 10
        book.leases.renewed(book.due(), lease_of(1, 30, 30))
    assert [(r.levelname, r.name, r.getMessage()) for r in caplog.records] == 2 * [
        ("WARNING", "moorage", "the lease on m is not renewed (down); trying again"),
        ("INFO", "moorage", "the lease on m is held again"),
    ]


def test_what_ends_in_mid_step_stays_ended(caplog):
    book = Book()
    book.now += 10
    held = book.due()
    assert book.leases.drop("m") == ["lease 1"]
    book.leases.renewed(held, lease_of(1, 30, 30))
    book.leases.failed(held, GONE)
    assert book.reloaded(held, 2) == "lease 2"
    assert (book.leases.of("m"), book.leases.wait(), book.leases.drop()) == (None, None, [])
    assert caplog.records == []


def test_what_is_replaced_in_mid_step_stays_replaced():
    book = Book()
    book.now += 10
    held = book.due()
    assert book.take(2, 30) == "lease 1"
    book.leases.renewed(held, lease_of(1, 30, 30))
    book.leases.failed(held, GONE)
    assert book.reloaded(held, 3) == "lease 3"
    assert book.leases.of("m").id == "lease 2"


def test_a_lost_lease_is_not_released():
    book = Book()
    book.now += 10
    book.leases.failed(book.due(), GONE)
    with book.leases.ending("m") as lease_id:
        assert lease_id == ""
    book.take(2, 30)
    book.now += 10
    book.leases.failed(book.due(), GONE)
    assert book.take(3, 30) == ""
    book.now += 10
    book.leases.failed(book.due(), GONE)
    assert book.leases.drop() == []


def test_a_model_that_comes_back_as_another_is_not_leased(caplog):
    book = Book()
    book.now += 10
    book.leases.failed(book.due(), GONE)
    assert book.reloaded(book.due(lost=True), 2, handle="n") == "lease 2"
    assert book.leases.wait() is None
    assert "is now n" in caplog.text


@pytest.mark.parametrize(
    ("reason", "held"),
    [("MODEL_LEASED", True), ("PERMISSION_DENIED", True), ("MODEL_NOT_LOADED", False), ("", False)],
)
def test_a_failed_unload_keeps_the_lease_only_of_a_model_that_stays(reason, held):
    book = Book()
    changes = book.changes

    def unload() -> None:
        with book.leases.ending("m") as lease_id:
            assert lease_id == "lease 1"
            assert book.leases.wait() is None
            raise moorage.Error("no", reason=reason)

    with pytest.raises(moorage.Error, match="no"):
        unload()
    assert (book.leases.of("m") is not None) is held
    assert (book.changes > changes) is held


# Watching.


def model(handle: str, state: int = pb.MODEL_STATE_READY) -> pb.Model:
    return pb.Model(handle=handle, state=state)


def snapshot(epoch: str, sequence: int, *handles: str) -> pb.WatchModelsResponse:
    models = pb.ModelList(models=map(model, handles))
    return pb.WatchModelsResponse(epoch=epoch, sequence=sequence, snapshot=models)


def changed(epoch: str, sequence: int, handle: str, state: int = pb.MODEL_STATE_READY):
    return pb.WatchModelsResponse(epoch=epoch, sequence=sequence, changed=model(handle, state))


BREAK = object()
END = object()


def outline(change: moorage.Change) -> tuple:
    which = change.model and f"{change.model.handle} {change.model.state}"
    return change.sequence, which, [model.handle for model in change.models]


def watched(play, count, *calls):
    """What a client tells of what the server sends in each call; and what the client asked for."""
    left = list(calls)

    def watch(request, context):
        for message in left.pop(0):
            if message is BREAK:
                context.abort(UNAVAILABLE, "Socket closed")
            if message is END:
                return
            yield message
        while context.is_active():  # as a server does that has nothing more to tell
            time.sleep(0.005)

    async def scenario(client):
        told = []
        async with aclosing(client.watch()) as changes:
            async for change in changes:
                told.append(change)
                if len(told) == count:
                    break
        return list(map(outline, told))

    with serving(WatchModels=watch) as fake:
        told = play(fake.address, scenario)
    return told, [(request.epoch, request.sequence) for request in fake.requests]


HEARTBEAT = pb.WatchModelsResponse(epoch="e", sequence=5)


def test_a_watch_tells_of_all_models_and_then_of_each_change(play):
    told, asked = watched(
        play,
        6,
        [
            snapshot("e", 5, "a", "b"),
            HEARTBEAT,
            changed("e", 6, "c", pb.MODEL_STATE_LOADING),
            changed("e", 7, "a", pb.MODEL_STATE_DRAINING),
            HEARTBEAT,
            changed("e", 8, "a", pb.MODEL_STATE_UNLOADED),
            changed("e", 9, "c", pb.MODEL_STATE_FAILED),
            changed("e", 10, "d", pb.MODEL_STATE_CANCELLED),
        ],
    )
    assert told == [
        (5, None, ["a", "b"]),
        (6, "c loading", ["a", "b", "c"]),
        (7, "a draining", ["a", "b", "c"]),
        (8, "a unloaded", ["b", "c"]),
        (9, "c failed", ["b"]),
        (10, "d cancelled", ["b"]),
    ]
    assert asked == [("", 0)]


@pytest.mark.parametrize("end", [BREAK, END])
def test_a_watch_goes_on_where_it_was(play, end):
    told, asked = watched(
        play,
        5,
        [snapshot("e", 5, "a"), changed("e", 6, "b"), HEARTBEAT, end],
        [HEARTBEAT, end],
        [end],
        [changed("e", 7, "c"), changed("e", 8, "d"), end],
        [changed("e", 9, "b", pb.MODEL_STATE_UNLOADED)],
    )
    assert told == [
        (5, None, ["a"]),
        (6, "b ready", ["a", "b"]),
        (7, "c ready", ["a", "b", "c"]),
        (8, "d ready", ["a", "b", "c", "d"]),
        (9, "b unloaded", ["a", "c", "d"]),
    ]
    assert asked == [("", 0), ("e", 6), ("e", 6), ("e", 6), ("e", 8)]


def test_a_watch_begins_anew_with_another_run_of_the_server(play):
    told, asked = watched(
        play,
        3,
        [snapshot("e", 5, "a", "b"), BREAK],
        [snapshot("f", 1, "b"), BREAK],
        [changed("f", 2, "c")],
    )
    assert told == [(5, None, ["a", "b"]), (1, None, ["b"]), (2, "c ready", ["b", "c"])]
    assert asked == [("", 0), ("e", 5), ("f", 1)]


def test_a_watch_outlives_any_number_of_breaks_that_the_server_answers_between(play):
    breaks = [[HEARTBEAT, BREAK]] * 12
    told, asked = watched(play, 2, [snapshot("e", 5), BREAK], *breaks, [changed("e", 6, "a")])
    assert told == [(5, None, []), (6, "a ready", ["a"])]
    assert len(asked) == 14


def watch_that_fails(play, first: list[pb.WatchModelsResponse], reason: str | None):
    """Watches until the client gives up; how often it asked."""

    def watch(request, context):
        yield from first
        first.clear()
        fail(context, UNAVAILABLE, "stopping", reason)

    async def scenario(client):
        async with aclosing(client.watch()) as changes:
            with pytest.raises(moorage.Unavailable, match="stopping"):
                async for _ in changes:
                    pass

    with serving(WatchModels=watch) as fake:
        play(fake.address, scenario)
    return len(fake.requests)


def test_a_watch_that_never_was_answered_fails_at_once(play):
    assert watch_that_fails(play, [], None) == 1


def test_a_watch_does_not_resume_what_the_server_refused(play):
    assert watch_that_fails(play, [snapshot("e", 5)], "SERVER_DRAINING") == 1


def test_a_watched_model_can_be_asked_for_its_lease(play):
    desk = Desk()

    async def scenario(client):
        await client.load("m", lease=60)
        async with aclosing(client.watch()) as changes:
            change = await anext(changes)
        return [model.lease and model.lease.id for model in change.models]

    with serving(**desk.script(WatchModels=lambda *_: iter([snapshot("e", 1, "m", "n")]))) as fake:
        assert play(fake.address, scenario) == ["lease 1", None]
