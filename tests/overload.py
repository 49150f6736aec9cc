"""Clients that ask for more than a server can do; light enough for processes of their own."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, replace

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import moorage
from moorage.v1 import moorage_pb2 as pb

CONNECTIONS = 8
_FORWARD = "/moorage.v1.ScoringService/Forward"
_PARSE = pb.ForwardResponse.FromString
_LOCAL = [("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True)
class Load:
    """What is asked, again and again.

    Attributes:
        address: The server.
        handle: The model.
        rows: Rows of a request, of 120 tokens each.
    """

    address: str
    handle: str
    rows: int

    def token_ids(self) -> np.ndarray:
        """The rows of a request."""
        return np.arange(self.rows * 120).reshape(self.rows, 120) % 300 + 2

    def request(self) -> pb.ForwardRequest:
        """The request, without an id."""
        return pb.ForwardRequest(
            handle=self.handle,
            token_ids=self.token_ids().reshape(-1).tolist(),
            row_lengths=[120] * self.rows,
        )


@dataclass(frozen=True)
class Told:
    """What became of requests.

    Attributes:
        rate: Requests a second that were answered, while more were asked.
        counts: How many ended how: "answered", "QUEUE_FULL", "QUEUE_FULL without RetryInfo".
    """

    rate: float
    counts: Counter[str]


def keep_busy(load: Load, in_flight: int, seconds: float) -> float:
    """Requests a second that a client gets answered which always has some in flight."""

    async def run() -> float:
        answered, end = 0, time.monotonic() + seconds
        async with moorage.aio.connect(load.address) as client:
            await client.models()  # it answers

            async def one() -> None:
                nonlocal answered
                while time.monotonic() < end:
                    scores = await client.forward(load.handle, load.token_ids())
                    assert len(scores.logprobs) == load.rows
                    answered += time.monotonic() < end

            await asyncio.gather(*(one() for _ in range(in_flight)))
        return answered / seconds

    return asyncio.run(run())


def flood(load: Load, rate: float, seconds: float) -> Told:
    """Sends requests at a rate, whatever becomes of them; nothing is sent twice."""

    async def run() -> Told:
        ended: list[str | grpc.aio.AioRpcError] = []
        channels = [
            grpc.aio.insecure_channel(load.address, options=_LOCAL) for _ in range(CONNECTIONS)
        ]
        stubs = [channel.unary_stream(_FORWARD, None, _PARSE) for channel in channels]
        request = load.request().SerializeToString()
        begin, calls = time.monotonic(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(begin + number / rate - time.monotonic())
            stub = stubs[number % CONNECTIONS]
            calls.append(asyncio.create_task(_ask(stub, request, ended)))
        in_time, taken = ended.count("answered"), time.monotonic() - begin
        await asyncio.gather(*calls)
        await asyncio.gather(*(channel.close() for channel in channels))
        return Told(in_time / taken, Counter(map(_told, ended)))

    return asyncio.run(run())


async def _ask(forward, request: bytes, ended: list[str | grpc.aio.AioRpcError]) -> None:
    """Asks once; what a refusal says is read when the server has nothing to do any more."""
    received = 0
    try:
        async for part in forward(request):
            received += len(part.chunk.data)
    except grpc.aio.AioRpcError as error:
        ended.append(error)
    else:
        assert received > 0
        ended.append("answered")


def _told(end: str | grpc.aio.AioRpcError) -> str:
    if isinstance(end, str):
        return end
    status = rpc_status.from_call(end)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    status.details[0].Unpack(info)
    soon = len(status.details) == 2 and status.details[1].Unpack(retry)
    wait = retry.retry_delay.ToNanoseconds() / 1e9
    return info.reason if soon and 0.1 <= wait <= 60.0 else f"{info.reason} without RetryInfo"


def finish_all(load: Load, requests: int) -> int:
    """Sends so many requests at once by the client library, and gives how many were answered."""

    async def run() -> int:
        async with moorage.aio.connect(load.address) as client:
            await client.models()
            asked = [client.forward(load.handle, load.token_ids()) for _ in range(requests)]
            return len(await asyncio.gather(*asked))

    return asyncio.run(run())


def sized(load: Load, rate: float = 14.0) -> Load:
    """The same with as many rows as let the server do about so many of it a second."""
    keep_busy(load, 4, 2.0)
    return replace(load, rows=round(load.rows * keep_busy(load, 4, 4.0) / rate))
