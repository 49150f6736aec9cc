"""Many clients that want more models than fit, over the wire."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import grpc
import pytest

from cache_scenario import wanted
from conftest import GOLDEN
from engine_double import EngineDouble
from moorage import Error
from moorage.errors import translated
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_server import convert
from server_thread import ServerThread, serving

NAMES = ("llama3", "gemma2", "qwen3_tied")
CLIENTS = 50


class CountingEngine(EngineDouble):
    """Two models fit; counts the loads and the unloads of each."""

    def __init__(self) -> None:
        super().__init__(room=2)
        self.loads: Counter[str] = Counter()
        self.unloads: Counter[str] = Counter()

    def load(self, handle, checkpoint, monitor):
        self.loads[handle] += 1
        return super().load(handle, checkpoint, monitor)

    def unload(self, handle):
        self.unloads[handle] += 1
        return super().unload(handle)


async def ask(server: ServerThread, draw: random.Random) -> str:
    """One client's life: it loads a model, and runs it for as long as it has a lease.

    Returns:
        What it was given: "scores", or the reason why not.
    """
    name, lease = draw.choice(NAMES), draw.random() < 0.5
    await asyncio.sleep(draw.random() / 10)
    message = pb.LoadModelRequest(model=convert.to_spec(wanted(name)))
    if lease:
        message.lease.duration.FromSeconds(60)
    async with grpc.aio.insecure_channel(server.address) as channel:
        try:
            with translated(server.address):
                models = pb_grpc.ModelServiceStub(channel)
                answers = [answer async for answer in models.LoadModel(message)]
                forward = pb.ForwardRequest(
                    handle=answers[-1].model.handle, token_ids=[7, 8], row_lengths=[2]
                )
                scores = pb_grpc.ScoringServiceStub(channel).Forward(forward)
                assert [part.WhichOneof("part") async for part in scores] == ["header", "chunk"]
                if lease:
                    ended = pb.ReleaseLeaseRequest(lease_id=answers[-1].lease.id)
                    await models.ReleaseLease(ended)
        except Error as error:
            reason = error.reason
        else:
            return "scores"
    # Without a lease it may have been evicted between the two calls.
    assert reason != "MODEL_NOT_LOADED" or not lease
    return reason


async def ask_all(server: ServerThread, seed: int) -> Counter[str]:
    draws = [random.Random(f"{seed}/{client}") for client in range(CLIENTS)]
    async with asyncio.timeout(30):
        return Counter(await asyncio.gather(*(ask(server, draw) for draw in draws)))


@pytest.mark.parametrize(
    "seeds", [range(3), pytest.param(range(3, 203), marks=pytest.mark.soak)], ids=["few", "many"]
)
def test_every_client_gets_its_model_or_is_told_why_not(seeds: range) -> None:
    engine = CountingEngine()
    with serving(engine, GOLDEN) as server:
        for seed in seeds:
            told = asyncio.run(ask_all(server, seed))
            assert told.total() == CLIENTS
            assert set(told) <= {"scores", "DEVICE_BUDGET_EXCEEDED", "MODEL_NOT_LOADED"}, seed
            assert told["scores"] >= 2
            here = {
                handle: engine.loads[handle] - engine.unloads[handle] for handle in engine.loads
            }
            assert {handle for handle, count in here.items() if count} == engine.loaded
            assert set(here.values()) <= {0, 1}, seed
            assert len(engine.loaded) <= 2
    assert engine.count("loaded") == engine.loads.total()
    assert engine.count("unload") > 0
