"""A server from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.sources import Policy
from moorage_server.cache import ModelCache
from moorage_server.draining import Draining
from moorage_server.engine import Engine
from moorage_server.health import report
from moorage_server.scheduler import QUEUE_TOKENS, Scheduler
from moorage_server.service import (
    MAX_MESSAGE_BYTES,
    ModelService,
    NamingService,
    ScoringService,
    ServerService,
)
from moorage_server.status import ErrorInterceptor

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # Clients ping through long silences: a load may be quiet, a forward pass long.
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
]
_POLL_SECONDS = 0.02
_CLOSE_SECONDS = 1.0  # for the calls that are left: watches, loads
_EXIT_SECONDS = 2.0  # for threads that cannot be stopped: a compile, a hub that hangs

_log = logging.getLogger("moorage")


@dataclass(frozen=True)
class Server:
    """A server with every service added.

    Attributes:
        grpc: The gRPC server, not yet listening.
        healthy: Its health service.
        cache: Its models.
        scheduler: Its requests.
        draining: Whether it is about to stop.
        about: Its mesh, for people.
    """

    grpc: grpc.aio.Server
    healthy: Any
    cache: ModelCache
    scheduler: Scheduler
    draining: Draining
    about: str

    async def drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """Takes no more work, and returns once the requests that were taken have their answers.

        Args:
            seconds: For how long they are waited for.
            hurry: Set when they are to be waited for no longer.
        """
        self.draining.started = True
        await self.healthy.enter_graceful_shutdown()
        end = time.monotonic() + seconds
        while self.scheduler.callers and not hurry.is_set() and time.monotonic() < end:
            await asyncio.sleep(_POLL_SECONDS)
        self.cache.stop()


def make_server(
    cache: ModelCache, engine: Engine, policy: Policy, queue_tokens: int = QUEUE_TOKENS
) -> Server:
    """A server with every service added, not yet listening."""
    scheduler, draining = Scheduler(engine, cache.device_thread, queue_tokens), Draining()
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_OPTIONS)
    pb_grpc.add_NamingServiceServicer_to_server(NamingService(cache, engine), server)
    pb_grpc.add_ModelServiceServicer_to_server(ModelService(cache, draining), server)
    scoring = ScoringService(cache, engine, scheduler, draining)
    pb_grpc.add_ScoringServiceServicer_to_server(scoring, server)
    about = ServerService(cache, engine, policy, scheduler)
    pb_grpc.add_ServerServiceServicer_to_server(about, server)
    healthy: Any = getattr(health, "aio").HealthServicer()  # noqa: B009 - untyped
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    names = [service.full_name for service in pb.DESCRIPTOR.services_by_name.values()]
    names += [health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)
    info = engine.info()
    mesh = ",".join(f"{name}={size}" for name, size in info.mesh.items())
    devices = f"mesh {mesh} of {info.devices[0].kind}"
    return Server(server, healthy, cache, scheduler, draining, devices)


async def serve(server: Server, listen: str, drain_seconds: float, *, restore: bool) -> int:
    """Serves until it is told to stop, by SIGINT or SIGTERM; by a second one, at once.

    Args:
        server: The server.
        listen: Address and port.
        drain_seconds: How long the requests that were taken may take then.
        restore: Whether what the journal has is loaded again.

    Returns:
        The exit code: 1 if it cannot listen.
    """
    try:
        port = server.grpc.add_insecure_port(listen)
    except RuntimeError:
        problem = "it is not host:port" if ":" not in listen else "is it in use?"
        print(f"moorage serve: cannot listen on {listen}: {problem}", file=sys.stderr)
        return 1
    if restore:
        server.cache.restore()
    await server.grpc.start()
    reporting = asyncio.create_task(report(server.cache, server.healthy))
    _log.info("serving on %s:%d, %s", listen.rsplit(":", 1)[0], port, server.about)
    stop, hurry = _signals()
    await stop.wait()
    _log.info("stopping; a second signal stops at once")
    reporting.cancel()
    await server.drain(drain_seconds, hurry)
    _exit_after(_CLOSE_SECONDS + _EXIT_SECONDS)
    await server.grpc.stop(0.0 if hurry.is_set() else _CLOSE_SECONDS)
    return 0


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events that the first and the second signal set."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop, hurry


def _exit_after(seconds: float) -> None:
    """Ends the process even if threads go on by then: nothing that they do is wanted any more."""
    timer = threading.Timer(seconds, os._exit, [0])
    timer.daemon = True
    timer.start()
