"""Health by grpc.health.v1: whether the server lives, whether it is ready, and each model.

""       it answers, and the device thread is not stuck: if not, it has to be started anew
ready    and it takes work: it is not stopping, and what was to be restored is there
<handle> and that model is READY
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

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
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    """Answers who asks for health; everything here runs in one event loop.

    gRPC's own holds a lock while it writes, so that one who watches and does not read would hold up
    whoever has news.
    """

    def __init__(self) -> None:
        self._statuses = {"": _STATUS[True]}
        self._changed = asyncio.Event()
        self._stopping = False

    def set(self, name: str, status: Any) -> None:
        """Says how a service is, and wakes who watches; nothing once the server stops."""
        if not self._stopping:
            self._statuses[name] = status
            self._wake()

    def stop(self) -> None:
        """No service serves from now on."""
        self._statuses = dict.fromkeys(self._statuses, _STATUS[False])
        self._stopping = True
        self._wake()

    async def Check(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> health_pb2.HealthCheckResponse:
        """How a service is; NOT_FOUND if there is none of that name."""
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=self._statuses[request.service])

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """How a service is, and the latest whenever that changes."""
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def report(
    cache: ModelCache, healthy: HealthService, stuck_seconds: float = STUCK_SECONDS
) -> None:
    """Keeps the health service, and who watches leases, up to date, until it is cancelled.

    Args:
        cache: What is served.
        healthy: The service.
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
                healthy.set(name, _STATUS[serves])
        told = now
        await asyncio.sleep(_CHECK_SECONDS)
