"""Coroutines around a cache whose engine a test controls, as tests."""

import asyncio
import functools
import gc
import time
from contextlib import suppress
from unittest import mock

import grpc
import pytest

from conftest import GOLDEN
from engine_double import EngineDouble
from moorage.v1 import moorage_pb2 as pb
from moorage_models.errors import ModelError
from moorage_models.sources import ModelRequest, ModelSource, Policy
from moorage_server.access import Caller, Role
from moorage_server.cache import Model, ModelCache
from moorage_server.calls import CURRENT, Call
from moorage_server.draining import Draining
from moorage_server.errors import ServerError
from moorage_server.scheduler import Scheduler
from moorage_server.scoring_service import ScoringService

HALF = {"fetch": (100, 100), "place": (50, 100)}
CONTEXT = mock.create_autospec(grpc.aio.ServicerContext)
CONTEXT.time_remaining.return_value = None
CALL = Call("Forward", "1", Caller("ipv4:127.0.0.1:1", Role.ADMIN))
PATH = str(GOLDEN / "llama3")
WHOLE = {"fetch": (100, 100), "place": (100, 100), "compile": (100, 100)}


def scenario(body=None, *, room=1 << 20, now=time.monotonic):
    """Makes a test of a coroutine function; fails if asyncio complains of anything.

    Args:
        body: Takes a cache and its engine.
        room: How many models fit in device memory.
        now: The clock of the leases.
    """
    if body is None:
        return functools.partial(scenario, room=room, now=now)

    def test(caplog):
        engine, problems = EngineDouble(room), []

        async def run():
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: problems.append(context))
            CURRENT.set(CALL)
            try:
                await asyncio.wait_for(body(ModelCache(engine, Policy(), now), engine), 20)
            finally:
                engine.release()
            gc.collect()

        asyncio.run(run())
        gc.collect()
        assert problems == []
        assert [record for record in caplog.records if record.name == "asyncio"] == []

    test.__name__ = body.__name__
    return test


def wanted(name="llama3", **fields):
    return ModelRequest(name, ModelSource.INTERNAL, str(GOLDEN / name), **fields)


async def load(cache, request=None, seen=None):
    """Watches a load to its end, as LoadModel does; appends what it sees of the progress."""
    join = cache.join(request or wanted())
    try:
        model = await asyncio.shield(join)
    except asyncio.CancelledError:
        cache.leave(join)
        raise
    async for _ in cache.watch(model):
        if seen is not None:
            stages = model.monitor.stages()
            seen.append({name: (stage.done, stage.total) for name, stage in stages.items()})
    return model


async def forward(cache, engine, model: Model):
    """One pass over three tokens, by the servicer itself."""
    CURRENT.set(CALL)
    request = pb.ForwardRequest(handle=model.handle, token_ids=[7, 8, 9], row_lengths=[3])
    service = ScoringService(cache, engine, Scheduler(engine, cache.device_thread), Draining())
    return [part async for part in service.Forward(request, CONTEXT)]


async def reached(engine, point, times=1):
    await asyncio.to_thread(engine.reached, point, times)


async def settle():
    """Long enough for what must not happen to happen."""
    await asyncio.sleep(0.05)


async def refusal(awaitable):
    with pytest.raises((ModelError, ServerError)) as caught:
        await awaitable
    return caught.value.reason


async def abandon(task):
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
