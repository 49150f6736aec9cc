"""A server that is told to stop: what it took is done, and nothing else is taken."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from cache_scenario import CONTEXT, load, reached, scenario, settle, wanted
from engine_double import EngineDouble
from moorage.v1 import moorage_pb2 as pb
from moorage_models.sources import Policy
from moorage_server import convert, serving
from moorage_server.cache import ModelCache
from moorage_server.errors import Reason, ServerError
from moorage_server.model_service import ModelService
from moorage_server.scoring_service import ScoringService
from moorage_server.serving import make_server
from moorage_server.settings import Settings


async def answer(server, engine, model):
    service = ScoringService(server.cache, engine, server.scheduler, server.draining)
    request = pb.ForwardRequest(handle=model.handle, token_ids=[7, 8, 9], row_lengths=[3])
    return [part.WhichOneof("part") async for part in service.Forward(request, CONTEXT)]


async def ask_for_model(server):
    service = ModelService(server.cache, server.draining)
    request = pb.LoadModelRequest(model=convert.to_spec(wanted("gemma2")))
    return [part.WhichOneof("event") async for part in service.LoadModel(request, CONTEXT)]


async def refusal(awaitable):
    with pytest.raises(ServerError) as caught:
        await awaitable
    return caught.value.reason, caught.value.retry_after


@scenario
async def test_what_was_taken_is_done_and_nothing_else_is_taken(cache, engine):
    server, hurry = make_server(cache, engine, Policy()), asyncio.Event()
    model = await load(cache)
    engine.hold("forward")
    running = asyncio.create_task(answer(server, engine, model))
    await reached(engine, "forward")
    draining = asyncio.create_task(server.drain(30.0, hurry))
    await settle()
    assert await refusal(answer(server, engine, model)) == (Reason.SERVER_DRAINING, 5.0)
    assert await refusal(ask_for_model(server)) == (Reason.SERVER_DRAINING, 5.0)
    assert not draining.done()
    engine.release()
    assert await running == ["header", "chunk"]
    await draining


@scenario
async def test_who_waits_for_a_load_is_told_to_come_back(cache, engine):
    server, hurry = make_server(cache, engine, Policy()), asyncio.Event()
    engine.hold("place")
    waiting = asyncio.create_task(ask_for_model(server))
    await reached(engine, "place")
    await server.drain(30.0, hurry)
    assert await refusal(waiting) == (Reason.SERVER_DRAINING, 5.0)


@scenario
async def test_a_second_signal_or_the_end_of_the_time_ends_the_wait(cache, engine):
    server, hurry = make_server(cache, engine, Policy()), asyncio.Event()
    model = await load(cache)
    engine.hold("forward")
    running = asyncio.create_task(answer(server, engine, model))
    await reached(engine, "forward")
    await server.drain(0.05, hurry)
    hurry.set()
    await server.drain(30.0, hurry)
    assert not running.done()
    engine.release()
    await running


#: A server that is told to stop while it is imported, or while its engine is made.
EARLY = """
import importlib, os, signal, sys
from moorage import cli

def stop(*_):
    os.kill(os.getpid(), signal.SIGTERM)

if sys.argv[1] == "import":
    importlib.import_module = stop
else:
    from moorage_server import main

    main._engine = stop
sys.exit(cli.main(["serve"]) or 3)
"""


@pytest.mark.parametrize("moment", ["import", "engine"])
def test_a_signal_before_anything_was_taken_ends_the_process(moment):
    command = [sys.executable, "-c", EARLY, moment]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


@pytest.fixture
def bounds(monkeypatch):
    """After how long the process would end in any case, from each signal on."""
    found = []
    monkeypatch.setattr(serving, "_exit_after", found.append)
    return found


def test_signals_count_before_the_server_listens(bounds, monkeypatch):
    async def listen(server, settings):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)

    async def run():
        engine = EngineDouble()
        server = make_server(ModelCache(engine, Policy()), engine, Policy())
        return await serving.serve(server, Settings(drain_seconds=7.0))

    monkeypatch.setattr(serving, "_listen", listen)
    assert asyncio.run(run()) == 0
    assert bounds[0] == 10.0


def test_each_signal_bounds_what_is_left_to_do(bounds):
    async def run():
        stop, hurry = serving._signals(30.0)
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        assert (bounds, hurry.is_set()) == ([33.0], False)
        os.kill(os.getpid(), signal.SIGTERM)
        await hurry.wait()

    asyncio.run(run())
    assert bounds == [33.0, 2.0]
