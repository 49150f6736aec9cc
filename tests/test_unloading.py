"""Unloading, beside passes that run or were abandoned, loads, and callers that leave."""

import asyncio
from unittest import mock

import pytest

from cache_scenario import (
    abandon,
    forward,
    load,
    reached,
    refusal,
    scenario,
    settle,
)
from engine_double import BYTES
from moorage_models.errors import Reason as ModelReason
from moorage_server import loader
from moorage_server.cache import State
from moorage_server.errors import Reason


@scenario
async def test_unloading_gives_the_bytes_back(cache, engine):
    model = await load(cache)
    assert await cache.unload(model.handle) == BYTES
    assert (cache.models(), engine.loaded) == ([], set())
    assert await refusal(cache.unload(model.handle)) == Reason.MODEL_NOT_LOADED


@scenario
async def test_unloading_waits_for_running_passes(cache, engine):
    model = await load(cache)
    engine.hold("forward")
    passes = [asyncio.create_task(forward(cache, engine, model)) for _ in range(2)]
    await reached(engine, "forward")
    unload = asyncio.create_task(cache.unload(model.handle))
    await settle()
    assert (model.state, model.in_use, engine.count("unload")) == (State.DRAINING, 2, 0)
    assert await refusal(forward(cache, engine, model)) == Reason.MODEL_NOT_LOADED
    engine.release()
    assert [len(answer) for answer in await asyncio.gather(*passes)] == [2, 2]
    assert await unload == BYTES
    assert engine.events[-1] == "unload"
    assert cache.models() == []


@scenario
async def test_unloading_never_races_with_an_abandoned_pass(cache, engine):
    model = await load(cache)
    engine.hold("forward")
    running = asyncio.create_task(forward(cache, engine, model))
    await reached(engine, "forward")
    await abandon(running)
    assert model.in_use == 0
    unload = asyncio.create_task(cache.unload(model.handle))
    await settle()
    assert engine.count("unload") == 0
    engine.release()
    assert await unload == BYTES
    assert engine.events[-3:] == ["forward", "forward ended", "unload"]
    assert model.forwards == 0


@scenario
async def test_unloading_cancels_a_running_load(cache, engine):
    engine.hold("place")
    task = asyncio.create_task(load(cache))
    await reached(engine, "place")
    (model,) = cache.models()
    assert await cache.unload(model.handle) == {}
    assert await refusal(task) == ModelReason.LOAD_CANCELLED
    assert (cache.models(), engine.count("unload")) == ([], 0)
    engine.release()
    assert (await load(cache)).state is State.READY


@scenario
async def test_a_load_that_cannot_be_stopped_any_more_is_unloaded(cache, engine):
    """One whose shapes need no trial, as with one row in each bucket."""
    with mock.patch.object(loader, "probes", return_value=[]):
        engine.hold("loaded")
        task = asyncio.create_task(load(cache))
        await reached(engine, "loaded")
        (model,) = cache.models()
        unload = asyncio.create_task(cache.unload(model.handle))
        await settle()
        engine.release()
        assert await unload == BYTES
        assert (cache.models(), engine.loaded) == ([], set())
        assert await task is model


@scenario
async def test_who_comes_after_an_unload_gets_a_load_of_its_own(cache, engine):
    engine.hold("loaded", "place")
    first = asyncio.create_task(load(cache))
    await reached(engine, "place")
    (model,) = cache.models()
    unload = asyncio.create_task(cache.unload(model.handle))
    await asyncio.sleep(0)
    second = asyncio.create_task(load(cache))
    assert await unload == {}
    assert await refusal(first) == ModelReason.LOAD_CANCELLED
    engine.release()
    again = await second
    assert again is not model
    assert (again.state, again.handle) == (State.READY, model.handle)
    assert engine.loaded == {model.handle}


@scenario
async def test_a_load_during_an_unload_starts_anew(cache, engine):
    model = await load(cache)
    engine.hold("forward")
    running = asyncio.create_task(forward(cache, engine, model))
    await reached(engine, "forward")
    unload = asyncio.create_task(cache.unload(model.handle))
    await settle()
    again = asyncio.create_task(load(cache))
    await settle()
    assert not again.done()
    engine.release()
    await asyncio.gather(running, unload)
    assert (await again).state is State.READY
    assert cache.models() == [await again]
    assert [e for e in engine.events if e in ("fetch", "unload")] == ["fetch", "unload", "fetch"]


@scenario
async def test_an_unload_whose_caller_left_goes_on(cache, engine):
    model = await load(cache)
    engine.hold("forward", "unload")
    running = asyncio.create_task(forward(cache, engine, model))
    await reached(engine, "forward")
    unload = asyncio.create_task(cache.unload(model.handle))
    await settle()
    await abandon(unload)
    engine.release("forward")
    await running
    await reached(engine, "unload")
    second = asyncio.create_task(cache.unload(model.handle))
    await settle()
    engine.release()
    assert await second == BYTES
    assert (cache.models(), engine.loaded, engine.count("unload")) == ([], set(), 1)


@scenario
async def test_callers_share_one_unload(cache, engine):
    model = await load(cache)
    freed = await asyncio.gather(*(cache.unload(model.handle) for _ in range(3)))
    assert freed == [BYTES] * 3
    assert engine.count("unload") == 1


@scenario
async def test_an_unload_that_fails_leaves_no_model_behind(cache, engine):
    model = await load(cache)
    engine.failures["unload"] = RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        await cache.unload(model.handle)
    assert cache.models() == []
