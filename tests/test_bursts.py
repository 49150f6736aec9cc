"""More requests at once than a server takes at once: each is answered, and told why if not."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import moorage
from conftest import GOLDEN
from engine_double import EngineDouble
from moorage.v1 import moorage_pb2 as pb
from moorage_server.limits import Limits
from server_thread import serving

_FORWARD = "/moorage.v1.ScoringService/Forward"


def reason(error: grpc.aio.AioRpcError) -> str:
    """The reason that a refusal carries; its code and text if gRPC speaks for the server."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    if status is None or not status.details[0].Unpack(info):
        return f"{error.code()}: {error.details()}"
    return info.reason


@pytest.mark.timeout(120)
def test_every_one_of_a_crowd_is_told_the_servers_own_reason():
    """gRPC turns away what it has not handed over yet, with no reason, above a thousand."""
    request = pb.ForwardRequest(handle="none", token_ids=[2] * 8, row_lengths=[8])

    async def crowd(address: str) -> Counter[str]:
        async with grpc.aio.insecure_channel(address) as channel:
            forward = channel.unary_stream(_FORWARD, pb.ForwardRequest.SerializeToString, None)

            async def one() -> str:
                try:
                    return str([part async for part in forward(request)])
                except grpc.aio.AioRpcError as error:
                    return reason(error)

            return Counter(await asyncio.gather(*(one() for _ in range(4000))))

    with serving(EngineDouble(), GOLDEN) as server:
        assert asyncio.run(crowd(server.address)).keys() <= {"MODEL_NOT_LOADED", "LIMIT_EXCEEDED"}


def test_a_client_over_its_limit_comes_again():
    with (
        serving(EngineDouble(), GOLDEN, limits=Limits(client_requests=8)) as server,
        moorage.connect(server.address) as client,
    ):
        model = client.load("llama3", "internal", "llama3")
        server.engine.hold("forward")
        asked = [model.forward_async(np.arange(2, 2 + n)[None]) for n in range(1, 33)]
        until(lambda: is_refused(client.info))
        server.engine.release()
        assert [len(answer.result(60).logprobs[0]) for answer in asked] == list(range(1, 33))


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except moorage.ResourceExhausted as error:
        return error.reason == "LIMIT_EXCEEDED"
    return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
