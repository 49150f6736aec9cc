"""Clients that want more models than fit; light enough for processes of their own."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import grpc

from moorage import Error
from moorage.errors import translated
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc

NAMES = ("llama3", "gemma2", "qwen3_tied")
PATIENCE = 30.0  # seconds, after which it counts as a deadlock


async def ask(address: str, root: Path, draw: random.Random) -> str:
    """One client's life: it loads a model, and runs it for as long as it has a lease.

    Returns:
        What it was given: "scores", or the reason why not.
    """
    name, lease = draw.choice(NAMES), draw.random() < 0.5
    await asyncio.sleep(draw.random() / 10)
    spec = pb.ModelSpec(model_id=name, source="MODEL_SOURCE_INTERNAL", model_path=str(root / name))
    message = pb.LoadModelRequest(model=spec)
    if lease:
        message.lease.duration.FromSeconds(60)
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            with translated(address):
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


def ask_all(address: str, root: Path, seed: int, clients: Iterable[int]) -> Counter[str]:
    """What some clients were given, side by side."""

    async def run() -> Counter[str]:
        draws = [random.Random(f"{seed}/{client}") for client in clients]
        async with asyncio.timeout(PATIENCE):
            return Counter(await asyncio.gather(*(ask(address, root, draw) for draw in draws)))

    return asyncio.run(run())
