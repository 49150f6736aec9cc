"""Health by grpc.health.v1: whether the server lives, whether it is ready, and each model.

""       it answers, and the device thread is not stuck: if not, it has to be started anew
ready    and it takes work: it is not stopping, and what was to be restored is there
<handle> and that model is READY
"""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2

from moorage_server.cache import ModelCache
from moorage_server.lifecycle import State

READY = "ready"

#: A forward pass takes seconds; one that takes this long will not end.
STUCK_SECONDS = 600.0

_CHECK_SECONDS = 0.5
_STATUS = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
}


async def report(cache: ModelCache, healthy: Any, stuck_seconds: float = STUCK_SECONDS) -> None:
    """Keeps the health service, and who watches leases, up to date, until it is cancelled.

    Args:
        cache: What is served.
        healthy: The service, of `grpc_health.v1.health.aio`.
        stuck_seconds: After so long in one piece of work the device thread counts as stuck.
    """
    told: dict[str, bool] = {}
    while True:
        cache.expire()
        lives = cache.device_thread.busy_seconds < stuck_seconds
        now = {m.handle: lives and m.state is State.READY for m in cache.models()}
        now |= {"": lives, READY: lives and not cache.is_restoring}
        for name, serves in (dict.fromkeys(told, False) | now).items():  # those that are gone, too
            if told.get(name) is not serves:
                await healthy.set(name, _STATUS[serves])
        told = now
        await asyncio.sleep(_CHECK_SECONDS)
