"""What the health service says: whether the server lives, is ready, and each model is."""

import asyncio
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from grpc_health.v1 import health_pb2

import moorage
from cache_scenario import abandon, forward, load, reached, scenario
from conftest import GOLDEN
from health_poller import poll
from moorage_server.health import report
from server_process import server_process

NAMES = ["llama3", "gemma2", "qwen3_tied", "qwen3_moe", "qwen2p5_tied", "llama3p2"]
ROWS = [[1, 5, 9, 4], [7, 2], list(range(1, 100))]


class Recorder:
    """Stands for the health service."""

    def __init__(self):
        self.said = {}

    async def set(self, name, status):
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
