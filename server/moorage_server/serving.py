"""A server from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.sources import Policy
from moorage_server.access import Access
from moorage_server.cache import ModelCache
from moorage_server.draining import Draining
from moorage_server.engine import Engine
from moorage_server.health import HealthService, report
from moorage_server.interceptor import Interceptor
from moorage_server.limits import Gate
from moorage_server.metrics import registry
from moorage_server.model_service import ModelService
from moorage_server.naming_service import NamingService
from moorage_server.scheduler import QUEUE_TOKENS, Scheduler
from moorage_server.scoring_service import ScoringService
from moorage_server.server_service import MAX_MESSAGE_BYTES, ServerService
from moorage_server.settings import Settings
from moorage_server.status_page import StatusPage
from moorage_server.tls import TlsFiles

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # Clients ping through long silences: a load may be quiet, a forward pass long.
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    # gRPC cancels calls, and gives no reason, of which more wait than this; its own is 1,000.
    ("grpc.server.max_pending_requests", 1 << 14),
    ("grpc.server.max_pending_requests_hard_limit", 1 << 14),
]
_WATCHES = 64  # calls of a connection beyond its client's requests: those are told of the limit
#: Of the server that answers health checks only, to anybody.
_PROBE_OPTIONS = [
    ("grpc.max_receive_message_length", 1 << 10),
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.max_allowed_incoming_connections", 256),
    ("grpc.max_connection_idle_ms", 60_000),
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
        access: Who may do what.
        about: What it says of itself.
    """

    grpc: grpc.aio.Server
    healthy: HealthService
    cache: ModelCache
    scheduler: Scheduler
    draining: Draining
    access: Access
    about: ServerService

    async def drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """Takes no more work, and returns once the requests that were taken have their answers.

        Args:
            seconds: For how long they are waited for.
            hurry: Set when they are to be waited for no longer.
        """
        self.draining.started = True
        self.healthy.stop()
        end = time.monotonic() + seconds
        while self.scheduler.callers and not hurry.is_set() and time.monotonic() < end:
            await asyncio.sleep(_POLL_SECONDS)
        self.cache.stop()


def make_server(
    cache: ModelCache,
    engine: Engine,
    policy: Policy,
    queue_tokens: int = QUEUE_TOKENS,
    access: Access | None = None,
) -> Server:
    """A server with every service added, not yet listening."""
    access, gate, draining = access or Access(), Gate(cache.limits), Draining()
    scheduler = Scheduler(
        engine, cache.device_thread, queue_tokens, limits=cache.limits, activity=cache.activity
    )
    options = [
        *_OPTIONS,
        ("grpc.max_allowed_incoming_connections", cache.limits.connections),
        ("grpc.max_concurrent_streams", cache.limits.client_requests + _WATCHES),
        ("grpc.http.overload_protection", 0),  # would refuse streams below that, with no reason
    ]
    interceptor = Interceptor(access, gate, cache.activity)
    server = grpc.aio.server(interceptors=[interceptor], options=options)
    pb_grpc.add_NamingServiceServicer_to_server(NamingService(cache, engine), server)
    pb_grpc.add_ModelServiceServicer_to_server(ModelService(cache, draining), server)
    scoring = ScoringService(cache, engine, scheduler, draining)
    pb_grpc.add_ScoringServiceServicer_to_server(scoring, server)
    about = ServerService(cache, engine, policy, scheduler, gate)
    pb_grpc.add_ServerServiceServicer_to_server(about, server)
    healthy = HealthService()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    names = [service.full_name for service in pb.DESCRIPTOR.services_by_name.values()]
    names += [health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)
    return Server(server, healthy, cache, scheduler, draining, access, about)


async def serve(server: Server, settings: Settings) -> int:
    """Serves until it is told to stop, by SIGINT or SIGTERM; by a second one, at once.

    Args:
        server: The server.
        settings: Where it listens, what it loads before it is ready, and how long the requests that
            were taken may take in the end.

    Returns:
        The exit code: 1 if it cannot listen.
    """
    stop, hurry = _signals(settings.drain_seconds)
    try:
        page = _page(server, settings)
        probes = await _listen(server, settings)
    except (RuntimeError, ValueError) as error:
        print(f"moorage serve: {error}", file=sys.stderr)
        return 1
    if settings.restore:
        server.cache.restore()
    server.cache.preload(settings.preload)
    await server.grpc.start()
    if page:
        await page.start()
        _log.info("status page at %s", page.url)
    reporting = asyncio.create_task(report(server.cache, server.healthy))
    await stop.wait()
    _log.info("stopping; a second signal stops at once")
    reporting.cancel()
    await server.drain(settings.drain_seconds, hurry)
    _exit_after(_CLOSE_SECONDS + _EXIT_SECONDS)
    await server.grpc.stop(0.0 if hurry.is_set() else _CLOSE_SECONDS)
    if probes:
        await probes.stop(0.0)
    if page:
        await page.stop()
    return 0


async def _listen(server: Server, settings: Settings) -> grpc.aio.Server | None:
    """Opens the ports; gives the server that answers health checks only, if there is one.

    Raises:
        RuntimeError: A port cannot be had.
        ValueError: The certificates cannot be used.
    """
    if files := _tls(settings):
        credentials = files.credentials()
        port = _port(settings.listen, lambda where: server.grpc.add_secure_port(where, credentials))
    else:
        port = _port(settings.listen, server.grpc.add_insecure_port)
    info = server.about.describe()
    mesh = ",".join(f"{axis.name}={axis.size}" for axis in info.mesh)
    _log.info(
        "serving on %s, mesh %s of %s%s",
        f"{settings.listen.rsplit(':', 1)[0]}:{port}",
        mesh,
        info.devices[0].kind,
        "" if settings.tls_cert else ", in plain text",
    )
    if not settings.health_listen:
        return None
    probes = grpc.aio.server(options=_PROBE_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(server.healthy, probes)
    _port(settings.health_listen, probes.add_insecure_port)
    await probes.start()
    return probes


def _page(server: Server, settings: Settings) -> StatusPage | None:
    """Opens the status page's port, if there is to be one.

    Raises:
        RuntimeError: The port cannot be had.
        ValueError: The certificates cannot be used.
    """
    if not settings.status_listen:
        return None
    metrics = registry(server.about, server.cache.activity.histograms)
    where, files = settings.status_listen, _tls(settings)
    return StatusPage(server.about, metrics, server.access, where, files)


def _tls(settings: Settings) -> TlsFiles | None:
    if settings.tls_cert and settings.tls_key:
        return TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return None


def _port(where: str, listen: Callable[[str], int]) -> int:
    try:
        return listen(where)
    except RuntimeError as error:
        raise RuntimeError(f"cannot listen on {where}: is it in use?") from error


def _signals(drain_seconds: float) -> tuple[asyncio.Event, asyncio.Event]:
    """Events that the first and the second signal set; each also bounds what is left to do."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
            _exit_after(_EXIT_SECONDS)
        else:
            stop.set()
            _exit_after(drain_seconds + _CLOSE_SECONDS + _EXIT_SECONDS)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop, hurry


def _exit_after(seconds: float) -> None:
    """Ends the process even if threads go on by then: nothing that they do is wanted any more."""
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), os._exit, [0])
    timer.daemon = True
    timer.start()
