"""Device memory that is not enough for all: who goes, who stays, and who is refused."""

import asyncio

import pytest

from cache_scenario import (
    CONTEXT,
    abandon,
    forward,
    load,
    reached,
    refusal,
    scenario,
    settle,
    wanted,
)
from conftest import GOLDEN
from moorage.v1 import moorage_pb2 as pb
from moorage_models.errors import ModelError
from moorage_server.draining import Draining
from moorage_server.errors import ServerError
from moorage_server.lifecycle import State
from moorage_server.model_service import ModelService


class Clock:
    """Seconds that pass only if a test says so."""

    time = 0.0

    def __call__(self):
        return self.time


CLOCK = Clock()

A, B, C, D = (wanted(name) for name in ("llama3", "gemma2", "qwen3_tied", "qwen2p5_tied"))


def names(cache):
    return [model.checkpoint.request.model_id for model in cache.models()]


@scenario(room=2)
async def test_the_least_recently_used_model_goes(cache, engine):
    first, second = await load(cache, A), await load(cache, B)
    await forward(cache, engine, first)
    assert cache.budget.reserved() == 2 * 600 + 50
    await load(cache, C)
    assert names(cache) == ["llama3", "qwen3_tied"]
    assert engine.loaded == {model.handle for model in cache.models()}
    assert second.state is State.UNLOADED
    assert list(second.history) == ["QUEUED", "LOADING", "READY", "DRAINING", "UNLOADED"]


@scenario(room=2, now=CLOCK)
async def test_a_leased_model_stays_until_its_lease_ends(cache, engine):
    leased, other = await load(cache, A), await load(cache, B)
    cache.lease(leased, "run 1", 60.0)
    await forward(cache, engine, other)  # used later than the leased one
    await load(cache, C)
    assert names(cache) == ["llama3", "qwen3_tied"]
    cache.lease((await load(cache, C)), "run 2", 90.0)
    with pytest.raises(ServerError) as caught:
        await load(cache, D)
    assert caught.value.reason == "DEVICE_BUDGET_EXCEEDED"
    assert "run 1 (60 s left), run 2 (90 s left)" in caught.value.message
    assert caught.value.details == {
        "needed_bytes": "650",
        "free_bytes": "0",
        "leased_bytes": "1200",
    }
    CLOCK.time += 61
    await load(cache, D)
    assert names(cache) == ["qwen3_tied", "qwen2p5_tied"]


@scenario(room=1)
async def test_a_model_that_runs_is_not_evicted(cache, engine):
    model = await load(cache, A)
    engine.hold("forward")
    running = asyncio.create_task(forward(cache, engine, model))
    await reached(engine, "forward")
    assert await refusal(load(cache, B)) == "DEVICE_BUDGET_EXCEEDED"
    engine.release("forward")
    await running
    await load(cache, B)
    assert names(cache) == ["gemma2"]


@scenario(room=1)
async def test_what_can_never_fit_evicts_nobody(cache, engine):
    kept = await load(cache, A)
    engine.room = 0
    cache.budget.capacity = 649
    with pytest.raises(ServerError, match=r"650 bytes .*, 600 .* weights; .* over more devices"):
        await load(cache, B)
    assert cache.models() == [kept]
    assert kept.state is State.READY


@scenario(room=2)
async def test_many_loads_at_once_never_take_more_than_there_is(cache, engine):
    most = 0

    async def watch():
        nonlocal most
        while True:
            most = max(most, cache.budget.reserved())
            assert most <= cache.budget.capacity
            assert len(engine.loaded) <= 2
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    for _ in range(5):
        found = await asyncio.gather(
            *(load(cache, r) for r in (A, B, C, D)), return_exceptions=True
        )
        assert {getattr(one, "reason", "loaded") for one in found} <= {
            "loaded",
            "DEVICE_BUDGET_EXCEEDED",
        }
    assert most == 2 * 600 + 50
    await abandon(watching)


@scenario(room=1)
async def test_a_load_that_waits_for_memory_is_cancelled_at_once(cache, engine):
    old = await load(cache, A)
    engine.hold("unload")
    waiting = asyncio.create_task(load(cache, B))
    await reached(engine, "unload")
    (queued,) = (model for model in cache.models() if model is not old)
    assert (old.state, queued.state) == (State.DRAINING, State.QUEUED)
    assert await asyncio.wait_for(cache.unload(queued.handle), 1) == {}
    assert await refusal(waiting) == "LOAD_CANCELLED"
    assert queued.state is State.CANCELLED
    engine.release("unload")
    await load(cache, C)
    assert names(cache) == ["qwen3_tied"]


@scenario(room=1)
async def test_what_a_failed_load_had_reserved_comes_back(cache, engine):
    engine.failures["place"] = RuntimeError("no")
    with pytest.raises(RuntimeError):
        await load(cache, A)
    assert cache.budget.reserved() == 0
    await load(cache, B)
    assert [change.value.model.state for change in cache.changes._latest] == [
        "QUEUED", "LOADING", "FAILED", "QUEUED", "LOADING", "READY",
    ]  # fmt: skip


@scenario
async def test_a_leased_model_is_unloaded_by_its_holder_or_by_force(cache, engine):
    model = await load(cache, A)
    lease, other = cache.lease(model, "me", 60.0), cache.lease(model, "you", 60.0)
    with pytest.raises(ServerError, match=r"leased by you \(60 s left\)") as caught:
        await cache.unload(model.handle, lease.id)
    assert caught.value.reason == "MODEL_LEASED"
    cache.release(other.id)
    await cache.unload(model.handle, lease.id)
    model = await load(cache, A)
    cache.lease(model, "you", 60.0)
    await cache.unload(model.handle, force=True)
    assert cache.models() == []
    assert await refusal_of(lambda: cache.leases.renew(other.id)) == "LEASE_UNKNOWN"


async def refusal_of(call):
    async def run():
        call()

    return await refusal(run())


def request(name, **fields):
    spec = pb.ModelSpec(
        model_id=name, source="MODEL_SOURCE_INTERNAL", model_path=str(GOLDEN / name)
    )
    return pb.LoadModelRequest(model=spec, **fields)


@pytest.mark.parametrize("others", [False, True])
def test_a_load_that_all_have_left_ends_if_all_asked_for_that(others, caplog):
    async def body(cache, engine):
        engine.hold("place")
        service = ModelService(cache, Draining())
        calls = [service.LoadModel(request("llama3", cancel_if_abandoned=True), CONTEXT)]
        calls += [service.LoadModel(request("llama3"), CONTEXT)] * others
        watching = [asyncio.create_task(anext(call)) for call in calls]
        await asyncio.wait(watching)
        (model,) = cache.models()
        for call in calls:
            await call.aclose()
        await settle()
        engine.release("place")
        if others:
            await model.load
            assert model.state is State.READY
        else:
            with pytest.raises(ModelError):
                await model.load
            assert model.state is State.CANCELLED
            assert cache.models() == []

    scenario(body)(caplog)


@scenario(now=CLOCK)
async def test_a_lease_by_the_wire(cache, engine):
    service = ModelService(cache, Draining())
    spec = pb.LeaseSpec(client="run 7")
    spec.duration.FromSeconds(30)
    answers = [a async for a in service.LoadModel(request("llama3", lease=spec), CONTEXT)]
    lease, model = answers[-1].lease, answers[-1].model
    assert (lease.client, lease.duration.seconds, lease.time_left.seconds) == ("run 7", 30, 30)
    assert [(x.id, x.client, x.time_left.seconds) for x in model.leases] == [("", "run 7", 30.0)]
    CLOCK.time += 20
    (listed,) = (await service.ListModels(pb.ListModelsRequest(), CONTEXT)).models
    assert listed.leases[0].time_left.seconds == 10
    renewed = await service.RenewLease(pb.RenewLeaseRequest(lease_id=lease.id), CONTEXT)
    assert renewed.lease.time_left.seconds == 30
    unload = pb.UnloadModelRequest(handle=model.handle)
    assert await refusal(service.UnloadModel(unload, CONTEXT)) == "MODEL_LEASED"
    await service.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=lease.id), CONTEXT)
    gone = service.RenewLease(pb.RenewLeaseRequest(lease_id=lease.id), CONTEXT)
    assert await refusal(gone) == "LEASE_UNKNOWN"
    await service.UnloadModel(unload, CONTEXT)


@scenario(now=CLOCK)
async def test_who_watches_learns_of_a_lease_that_ends_by_itself(cache, engine):
    model = await load(cache, A)
    cache.lease(model, "run 1", 60.0)
    cache.expire()
    latest = cache.changes.sequence
    CLOCK.time += 61
    cache.expire()
    (change,) = [change for change in cache.changes._latest if change.sequence > latest]
    assert (change.value.model.handle, change.value.leases) == (model.handle, ())


@scenario
async def test_a_lease_that_cannot_be_is_refused_before_the_load(cache, engine):
    spec = pb.LeaseSpec(client="run 7")
    answers = ModelService(cache, Draining()).LoadModel(request("llama3", lease=spec), CONTEXT)
    assert await refusal(anext(answers)) == "INVALID_REQUEST"
    assert cache.models() == []


@scenario
async def test_a_watch_tells_what_becomes_of_models(cache, engine):
    service = ModelService(cache, Draining())
    first = await load(cache, A)
    watch = service.WatchModels(pb.WatchModelsRequest(), CONTEXT)
    start = await anext(watch)
    assert [model.handle for model in start.snapshot.models] == [first.handle]
    assert start.sequence == 3
    await load(cache, B)
    await cache.unload(first.handle)
    seen = [await anext(watch) for _ in range(5)]
    assert [pb.ModelState.Name(s.changed.state).removeprefix("MODEL_STATE_") for s in seen] == [
        "QUEUED", "LOADING", "READY", "DRAINING", "UNLOADED",
    ]  # fmt: skip
    assert [s.sequence for s in seen] == [4, 5, 6, 7, 8]
    resumed = service.WatchModels(
        pb.WatchModelsRequest(epoch=start.epoch, sequence=seen[2].sequence), CONTEXT
    )
    assert (await anext(resumed)).changed == seen[3].changed
    other = service.WatchModels(pb.WatchModelsRequest(epoch="x", sequence=8), CONTEXT)
    assert len((await anext(other)).snapshot.models) == 1
    assert not (await anext(watch)).HasField("changed")  # a heartbeat
    for call in (watch, resumed, other):
        await call.aclose()
