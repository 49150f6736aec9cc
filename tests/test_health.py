"""What the health service says: whether the server lives, is ready, and each model is."""

import asyncio

from grpc_health.v1 import health_pb2

from cache_scenario import abandon, forward, load, reached, scenario
from moorage_server.health import report


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
