"""What a connection may hold before the server knows who it is."""

import asyncio
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conftest import GOLDEN
from engine_double import EngineDouble
from moorage_models.sources import Policy
from moorage_server import serving as module
from moorage_server.cache import ModelCache
from moorage_server.limits import Limits
from moorage_server.settings import Settings
from server_process import free_port
from server_thread import channel_to, serving

INFO = "/moorage.v1.ServerService/GetServerInfo"


def test_a_connection_has_a_bounded_number_of_calls():
    """Calls whose requests do not come wait beside one another, and another behind them."""
    never = threading.Event()
    limits = Limits(client_requests=2)
    with (
        serving(EngineDouble(), GOLDEN, limits=limits) as server,
        channel_to(server.address) as held,
        channel_to(server.address) as other,
    ):
        calls = [held.stream_stream(INFO)(iter(never.wait, True)) for _ in range(65)]
        assert held.unary_unary(INFO)(b"", timeout=10)
        calls.append(held.stream_stream(INFO)(iter(never.wait, True)))
        with pytest.raises(grpc.RpcError) as caught:
            held.unary_unary(INFO)(b"", timeout=1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert other.unary_unary(INFO)(b"", timeout=10)
        for call in calls:
            call.cancel()
        never.set()


async def ask(address: str) -> None:
    """Asks a server for health checks only, in few words and in many."""
    async with grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        await check(health_pb2.HealthCheckRequest(), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(health_pb2.HealthCheckRequest(service="x" * 2000), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_health_checks_without_a_token_are_small():
    async def run() -> None:
        engine, policy = EngineDouble(), Policy()
        server = module.make_server(ModelCache(engine, policy), engine, policy)
        server.healthy.set("", health_pb2.HealthCheckResponse.SERVING)
        address = f"127.0.0.1:{free_port()}"
        settings = Settings(listen="127.0.0.1:0", health_listen=address)
        probes = await module._listen(server, settings)
        assert probes
        await ask(address)
        await probes.stop(0)
        await server.grpc.stop(0)

    asyncio.run(run())
