"""One load for all: callers that come, leave and fail around an engine that a test controls."""

import asyncio
import logging
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest

from cache_scenario import (
    CONTEXT,
    HALF,
    PATH,
    WHOLE,
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
from engine_double import BYTES, STAGES
from moorage.v1 import moorage_pb2 as pb
from moorage_models.checkpoint import open_checkpoint
from moorage_models.errors import ModelError
from moorage_models.errors import Reason as ModelReason
from moorage_models.sources import ModelRequest, ModelSource, Policy
from moorage_server import looks as looks_module
from moorage_server.cache import State
from moorage_server.draining import Draining
from moorage_server.errors import Reason, ServerError
from moorage_server.limits import Limits
from moorage_server.model_service import ModelService

# One load for all.


@scenario
async def test_twenty_callers_share_one_load(cache, engine):
    engine.hold("place")
    seen = [[] for _ in range(20)]
    callers = [asyncio.create_task(load(cache, seen=progress)) for progress in seen]
    await reached(engine, "place")
    await settle()
    (model,) = cache.models()
    assert (model.state, model.waiters) == (State.LOADING, 20)
    assert all(progress[-1] == HALF for progress in seen)
    engine.release()
    assert await asyncio.gather(*callers) == [model] * 20
    assert engine.count("fetch") == 1
    assert (model.state, model.waiters, model.device_bytes) == (State.READY, 0, BYTES)


@scenario
async def test_what_is_loaded_is_given_at_once(cache, engine):
    model = await load(cache)
    seen = []
    assert await load(cache, seen=seen) is model
    assert seen == []
    assert engine.count("fetch") == 1


@scenario
async def test_a_caller_that_leaves_leaves_the_load(cache, engine):
    engine.hold("place", "compile")
    first = asyncio.create_task(load(cache))
    await reached(engine, "place")
    await abandon(first)
    (model,) = cache.models()
    assert (model.state, model.waiters) == (State.LOADING, 0)
    seen = []
    second = asyncio.create_task(load(cache, seen=seen))
    await settle()
    assert seen[0] == HALF
    engine.release("place")
    await reached(engine, "compile")
    await asyncio.sleep(0.2)
    assert seen[-1] == {**WHOLE, "compile": (50, 100)}
    engine.release()
    assert await second is model
    assert model.state is State.READY
    assert engine.count("fetch") == 1


@scenario
async def test_a_load_ends_even_if_every_caller_has_left(cache, engine):
    engine.hold("place")
    task = asyncio.create_task(load(cache))
    await reached(engine, "place")
    await abandon(task)
    engine.release()
    (model,) = cache.models()
    await model.load
    assert model.state is State.READY


@scenario
async def test_a_caller_that_leaves_while_the_source_is_asked_leaves_the_load(cache, engine):
    asked, answer = threading.Event(), threading.Event()

    def slow(*arguments, **options):
        asked.set()
        assert answer.wait(20)
        return open_checkpoint(*arguments, **options)

    with mock.patch.object(looks_module, "open_checkpoint", slow):
        spec = pb.ModelSpec(model_id="x", source="MODEL_SOURCE_INTERNAL", model_path=PATH)
        answers = ModelService(cache, Draining()).LoadModel(
            pb.LoadModelRequest(model=spec), CONTEXT
        )
        task = asyncio.create_task(anext(answers))
        await asyncio.to_thread(asked.wait, 20)
        await abandon(task)
        answer.set()
        await reached(engine, "loaded")


@scenario
async def test_who_leaves_a_look_that_is_shared_leaves_it_to_the_others(cache, engine):
    looking = asyncio.create_task(cache.looks.resolve(wanted()))
    await asyncio.sleep(0)
    loading = asyncio.create_task(load(cache))
    await asyncio.sleep(0)
    looking.cancel()
    assert (await loading).state is State.READY
    assert looking.cancelled()


@contextmanager
def hanging_looks():
    """Looks for "hangs" hang until the event is set; each releases the semaphore before."""
    hang, hung = threading.Event(), threading.Semaphore(0)

    def look(request, *arguments, **options):
        if request.model_id == "hangs":
            hung.release()
            hang.wait(20)
        return open_checkpoint(request, *arguments, **options)

    with mock.patch.object(looks_module, "open_checkpoint", look):
        yield hang, hung


@scenario
async def test_looks_that_hang_count_for_their_client_and_hold_nobody_else_up(cache, engine):
    def asked(revision: int) -> ModelRequest:
        return replace(wanted(), model_id="hangs", revision=str(revision))

    with hanging_looks() as (hang, hung):
        joins = [cache.join(asked(i), client="a") for i in range(32)]
        looks = [asyncio.create_task(cache.looks.look(asked(i), "a")) for i in range(32)]
        for _ in range(64):
            await asyncio.to_thread(hung.acquire, timeout=20)
        for task in looks:
            await abandon(task)  # its look goes on
        assert await refusal(cache.join(wanted(), client="a")) is Reason.LIMIT_EXCEEDED
        assert await refusal(cache.looks.look(wanted(), "a")) is Reason.LIMIT_EXCEEDED
        assert await asyncio.wait_for(cache.looks.look(wanted(), "b"), 10)
        hang.set()
        await asyncio.gather(*joins)
    assert await cache.looks.look(wanted(), "a")


@scenario
async def test_a_look_too_many_is_refused_to_its_client_only(cache, engine):
    cache.looks = looks_module.Looks(Policy(), Limits(client_models=1))
    with hanging_looks() as (hang, _):
        first = asyncio.create_task(cache.looks.look(replace(wanted(), model_id="hangs"), "a"))
        await settle()
        asked = [cache.looks.resolve(wanted(), client) for client in ("a", "b", None)]
        refused, *found = await asyncio.gather(*asked, return_exceptions=True)
        assert "1 looks into sources of this client" in str(refused)
        assert found[0] is found[1]
        hang.set()
        await first


@scenario
async def test_callers_share_one_look_into_the_source(cache, engine):
    looks = []

    def look(*arguments, **options):
        looks.append(arguments)
        return open_checkpoint(*arguments, **options)

    with mock.patch.object(looks_module, "open_checkpoint", look):
        await asyncio.gather(*(load(cache) for _ in range(20)))
        assert len(looks) == 1
        await load(cache)
        assert len(looks) == 2  # the files may have changed


@scenario
async def test_different_models_load_side_by_side(cache, engine):
    engine.hold("place")
    tasks = [asyncio.create_task(load(cache, wanted(name))) for name in ("llama3", "llama3p2")]
    await reached(engine, "place", times=2)
    assert [model.state for model in cache.models()] == [State.LOADING] * 2
    engine.release()
    one, other = await asyncio.gather(*tasks)
    assert one.handle != other.handle
    assert engine.loaded == {one.handle, other.handle}


# Failures.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "failure", [ModelError(ModelReason.CHECKPOINT_CORRUPT, "damaged"), RuntimeError("a bug")]
)
def test_a_failed_load_tells_all_and_the_next_starts_anew(stage, failure, caplog):
    @scenario
    async def run(cache, engine):
        engine.hold(stage)
        engine.failures[stage] = failure
        callers = [asyncio.create_task(load(cache)) for _ in range(3)]
        await reached(engine, stage)
        engine.release()
        told = await asyncio.gather(*callers, return_exceptions=True)
        assert [error is failure for error in told] == [True] * 3
        assert cache.models() == []
        model = await load(cache)
        assert model.state is State.READY
        assert engine.count("fetch") == 2

    run(caplog)


@scenario
async def test_a_load_that_fails_at_once_is_no_success(cache, engine):
    engine.failures["fetch"] = ModelError(ModelReason.SOURCE_UNAVAILABLE, "the hub is away")
    assert await refusal(load(cache)) == ModelReason.SOURCE_UNAVAILABLE


@scenario
async def test_a_load_that_fails_before_it_is_watched_is_no_success(cache, engine):
    engine.failures["fetch"] = ModelError(ModelReason.SOURCE_UNAVAILABLE, "the hub is away")
    model = await cache.join(wanted())
    await asyncio.wait([model.load])
    with pytest.raises(ModelError):
        async for _ in cache.watch(model):
            pass


def test_a_failure_that_nobody_waits_for_is_logged(caplog):
    @scenario
    async def run(cache, engine):
        engine.hold("place")
        engine.failures["place"] = ModelError(ModelReason.CHECKPOINT_CORRUPT, "damaged")
        task = asyncio.create_task(load(cache))
        await reached(engine, "place")
        await abandon(task)
        engine.release()
        while cache.models():
            await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING, "moorage_server"):
        run(caplog)
    assert "CHECKPOINT_CORRUPT: damaged" in caplog.text


def test_a_source_that_refuses_tells_all_and_those_who_left_not(caplog):
    @scenario
    async def run(cache, engine):
        absent = ModelRequest("x", ModelSource.INTERNAL, str(GOLDEN / "absent"))
        callers = [asyncio.create_task(load(cache, absent)) for _ in range(3)]
        await asyncio.sleep(0)
        callers[0].cancel()
        told = await asyncio.gather(*callers, return_exceptions=True)
        assert isinstance(told[0], asyncio.CancelledError)
        assert [error.reason for error in told[1:]] == [ModelReason.CHECKPOINT_NOT_FOUND] * 2
        assert cache.models() == []

    run(caplog)
    assert caplog.text.count("CHECKPOINT_NOT_FOUND") == 1


@scenario
async def test_stopping_cancels_every_load(cache, engine):
    engine.hold("place")
    tasks = [asyncio.create_task(load(cache, wanted(name))) for name in ("llama3", "llama3p2")]
    await reached(engine, "place", times=2)
    cache.stop()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [error.reason for error in told] == [ModelReason.LOAD_CANCELLED] * 2


# Names and counts.


@scenario
async def test_one_directory_by_two_names_is_one_model(cache, engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(GOLDEN)
        relative = ModelRequest("other/name", ModelSource.INTERNAL, "gemma2/../llama3")
        one, other = await asyncio.gather(load(cache), load(cache, relative))
    assert one is other
    assert engine.count("fetch") == 1


@scenario
async def test_what_decides_the_numbers_decides_the_handle(cache, engine):
    stored = await load(cache)
    assert stored.checkpoint.plan.dtype == "bfloat16"
    assert await load(cache, wanted(dtype="bfloat16")) is stored
    assert await load(cache, wanted(compute_dtype="bfloat16")) is stored
    others = [wanted(dtype="float32"), wanted(dtype="float16"), wanted(compute_dtype="float32")]
    models = [stored, *[await load(cache, other) for other in others]]
    assert len({model.handle for model in models}) == 4
    assert engine.count("fetch") == 4


def test_files_that_changed_are_another_model(tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama3", folder)
    request = ModelRequest("x", ModelSource.INTERNAL, str(folder))

    @scenario
    async def run(cache, engine):
        before = await load(cache, request)
        (folder / "model.safetensors").touch()
        assert (await load(cache, request)).handle != before.handle

    run(caplog)


@scenario
async def test_passes_are_counted_when_they_end_well(cache, engine):
    model = await load(cache)
    assert (model.forwards, model.tokens, model.last_use) == (0, 0, 0.0)
    await forward(cache, engine, model)
    await forward(cache, engine, model)
    assert (model.forwards, model.tokens, model.in_use) == (2, 6, 0)
    assert model.last_use >= model.started
    engine.failures["forward"] = RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        await forward(cache, engine, model)
    assert (model.forwards, model.tokens, model.in_use) == (2, 6, 0)


@scenario
async def test_an_unknown_handle_is_told_what_is_loaded(cache, engine):
    model = await load(cache)
    with pytest.raises(ServerError) as caught:
        cache.get("0123456789ab")
    assert caught.value.reason is Reason.MODEL_NOT_LOADED
    assert f"{model.handle} (llama3)" in caught.value.message


@scenario
async def test_a_model_that_is_not_ready_cannot_be_run(cache, engine):
    engine.hold("place")
    task = asyncio.create_task(load(cache))
    await reached(engine, "place")
    (model,) = cache.models()
    assert await refusal(forward(cache, engine, model)) == Reason.MODEL_NOT_LOADED
    engine.release()
    await forward(cache, engine, await task)
