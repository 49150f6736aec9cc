"""A server in a thread of this process, on a free port."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from moorage_models.sources import ModelSource, Policy
from moorage_server.access import Access
from moorage_server.cache import ModelCache
from moorage_server.engine import Engine
from moorage_server.limits import Limits
from moorage_server.serving import make_server
from moorage_server.tls import TlsFiles


@dataclass
class ServerThread:
    """A running server.

    Attributes:
        engine: Its engine.
        address: host:port.
        problems: What asyncio complained of in its event loop.
        access: Who may do what.
        tls: Where its certificates are; None for plain text.
        limits: What clients may have.
    """

    engine: Engine
    access: Access | None = None
    tls: TlsFiles | None = None
    limits: Limits | None = None
    address: str = ""
    problems: list[dict] = field(default_factory=list)
    _started: threading.Event = field(default_factory=threading.Event)

    async def run(self, policy: Policy) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda _, context: self.problems.append(context))
        cache = ModelCache(self.engine, policy, limits=self.limits)
        server = make_server(cache, self.engine, policy, access=self.access)
        if self.tls:
            port = server.grpc.add_secure_port("127.0.0.1:0", self.tls.credentials())
        else:
            port = server.grpc.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await server.grpc.start()
        server.healthy.set("", health_pb2.HealthCheckResponse.SERVING)
        self._started.set()
        await self._stop.wait()
        cache.stop()
        await server.grpc.stop(0)

    def wait_until_started(self) -> None:
        assert self._started.wait(30)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)


SOURCES = (ModelSource.HUGGINGFACE, ModelSource.INTERNAL, ModelSource.MAXTEXT)


@contextmanager
def serving(
    engine: Engine,
    *roots: Path,
    sources: Sequence[ModelSource] = SOURCES,
    access: Access | None = None,
    tls: TlsFiles | None = None,
    limits: Limits | None = None,
) -> Iterator[ServerThread]:
    """Serves directories under some roots; fails if asyncio complains of anything."""
    server = ServerThread(engine, access, tls, limits)
    policy = Policy(tuple(sources), roots)
    thread = threading.Thread(target=lambda: asyncio.run(server.run(policy)), name="server")
    thread.start()
    server.wait_until_started()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
    assert not thread.is_alive()
    assert server.problems == []


@contextmanager
def channel_to(address: str) -> Iterator[grpc.Channel]:
    """A channel of its own, as a client in another language would open it."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield channel
