"""What the health service says: whether the server lives, is ready, and each model is."""

import asyncio
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import moorage
from cache_scenario import abandon, forward, load, reached, scenario
from conftest import GOLDEN
from health_poller import poll
from moorage_models.sources import Policy
from moorage_server.health import report
from moorage_server.serving import make_server
from server_process import server_process

NAMES = ["llama3", "gemma2", "qwen3_tied", "qwen3_moe", "qwen2p5_tied", "llama3p2"]
ROWS = [[1, 5, 9, 4], [7, 2], list(range(1, 100))]


class Recorder:
    """Stands for the health service."""

    def __init__(self):
        self.said = {}

    def set(self, name, status):
        self.said[name] = health_pb2.HealthCheckResponse.ServingStatus.Name(status)


async def until(recorder, expected):
    while recorder.said != expected:
        await asyncio.sleep(0.01)


def watched(body):
    """A scenario in which health is reported, often."""

    async def test(cache, engine):
        recorder = Recorder()
        reporting = asyncio.create_task(report(cache, recorder, stuck_seconds=0.2))
        await body(cache, engine, recorder)
        await abandon(reporting)

    test.__name__ = body.__name__
    return scenario(test)


@watched
async def test_a_model_is_healthy_once_it_is_ready_and_as_long(cache, engine, recorder):
    await until(recorder, {"": "SERVING", "ready": "SERVING"})
    engine.hold("place")
    loading = asyncio.create_task(load(cache))
    await reached(engine, "place")
    (model,) = cache.models()
    await until(recorder, {"": "SERVING", "ready": "SERVING", model.handle: "NOT_SERVING"})
    engine.release("place")
    await loading
    await until(recorder, {"": "SERVING", "ready": "SERVING", model.handle: "SERVING"})
    await cache.unload(model.handle)
    await until(recorder, {"": "SERVING", "ready": "SERVING", model.handle: "NOT_SERVING"})


@watched
async def test_a_stuck_device_thread_is_not_healthy(cache, engine, recorder):
    model = await load(cache)
    engine.hold("forward")
    running = asyncio.create_task(forward(cache, engine, model))
    stuck = {"": "NOT_SERVING", "ready": "NOT_SERVING", model.handle: "NOT_SERVING"}
    await until(recorder, stuck)
    engine.release("forward")
    await running
    await until(recorder, dict.fromkeys(stuck, "SERVING"))


STATUS = health_pb2.HealthCheckResponse


@asynccontextmanager
async def served(cache, engine):
    """A server, its address, and a client of its health."""
    server = make_server(cache, engine, Policy())
    address = f"127.0.0.1:{server.grpc.add_insecure_port('127.0.0.1:0')}"
    await server.grpc.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield server, address, health_pb2_grpc.HealthStub(channel)
    finally:
        await server.grpc.stop(0)


def requests(server):
    """How many are under way."""
    return server.about.describe().activity.requests


async def next_of(watch):
    return (await asyncio.wait_for(watch.read(), 5)).status


@scenario
async def test_a_service_that_nobody_knows_may_still_come(cache, engine):
    request = health_pb2.HealthCheckRequest(service="ready")
    async with served(cache, engine) as (server, _, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(request)
        assert await next_of(watch) == STATUS.SERVICE_UNKNOWN
        server.healthy.set("ready", STATUS.SERVING)
        assert await next_of(watch) == STATUS.SERVING
        assert (await stub.Check(request)).status == STATUS.SERVING


@scenario
async def test_those_who_watch_are_told_when_another_has_left(cache, engine):
    async with served(cache, engine) as (server, _, stub):
        leaves, stays = (stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2))
        assert [await next_of(watch) for watch in (leaves, stays)] == [STATUS.SERVING] * 2
        leaves.cancel()
        while requests(server) > 1:
            await asyncio.sleep(0.01)
        for status in (STATUS.NOT_SERVING, STATUS.SERVING):
            server.healthy.set("", status)
            assert await next_of(stays) == status


@scenario
async def test_once_the_server_stops_no_service_serves_again(cache, engine):
    async with served(cache, engine) as (server, _, stub):
        server.healthy.set("ready", STATUS.SERVING)
        await server.drain(0.0, asyncio.Event())
        server.healthy.set("ready", STATUS.SERVING)
        for name in ("", "ready"):
            request = health_pb2.HealthCheckRequest(service=name)
            assert (await stub.Check(request)).status == STATUS.NOT_SERVING


#: The start of a connection whose client takes no data: SETTINGS with INITIAL_WINDOW_SIZE 0.
DEAF = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000006 04 00 00000000 0004 00000000")


def frame(kind, flags, payload):
    return len(payload).to_bytes(3) + bytes([kind, flags]) + (1).to_bytes(4) + payload


def literal(name, value):
    """A header, in neither of HPACK's tables."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))


@scenario
async def test_who_watches_and_does_not_read_holds_up_nobody(cache, engine):
    async with served(cache, engine) as (server, address, stub):
        host, port = address.split(":")
        _, writer = await asyncio.open_connection(host, port)
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/grpc.health.v1.Health/Watch",
            ":authority": address,
            "content-type": "application/grpc",
            "te": "trailers",
        }
        block = b"".join(literal(name, value) for name, value in headers.items())
        writer.write(DEAF + frame(1, 4, block) + frame(0, 1, bytes(5)))
        while not requests(server):
            await asyncio.sleep(0.01)
        server.healthy.set("", STATUS.NOT_SERVING)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == STATUS.NOT_SERVING
        await asyncio.wait_for(server.drain(0.0, asyncio.Event()), 5)
        writer.close()


@pytest.mark.soak
def test_health_answers_in_time_while_models_come_and_go(tmp_path):
    """Loads with cold compiles, forward passes and unloads, one after another, all the while."""
    spawn, rounds = multiprocessing.get_context("spawn"), 0
    with (
        server_process(GOLDEN, tmp_path, buckets="1x128,4x128,1x512") as server,
        moorage.connect(server.address) as client,
        ProcessPoolExecutor(1, spawn) as pool,
    ):
        polled = pool.submit(poll, server.address, 30.0)
        for name, dtype in itertools.product(NAMES, ["float32", "bfloat16"]):
            if polled.done():
                break
            model = client.load("x", "internal", name, compute_dtype=dtype, progress=False)
            for _ in range(10):
                client.forward(model, ROWS)
            client.unload(model)
            rounds += 1
        took = sorted(polled.result())
    p50, p99, most = (took[int(len(took) * part) - 1] for part in (0.5, 0.99, 1.0))
    print(f"{len(took)} of {rounds} rounds: p50 {p50:.4f}, p99 {p99:.4f}, most {most:.4f} s")
    assert len(took) == 600
    assert rounds >= 5
    assert p99 < 0.1
