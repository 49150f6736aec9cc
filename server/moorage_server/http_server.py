"""An HTTP server in the event loop that runs already, with the certificates that gRPC has."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from moorage_server.tasks import start
from moorage_server.tls import TlsFiles
from moorage_server.watched_file import WatchedFile

_CONNECTIONS = 64
_HEAD_SECONDS = 10.0  # for the head of a request
_CLOSE_SECONDS = 1
_POLL_SECONDS = 0.01


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs the event loop."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


class _Protocol(H11Protocol):
    """Closes connections that ask for nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._next_look.cancel()

    def _look_again(self) -> None:
        self._next_look = self.loop.call_later(_HEAD_SECONDS, self._look, self.cycle)

    def _look(self, before: Any) -> None:
        """Closes the connection if no request has come since, and none is being answered."""
        if self.cycle is not before or (before and not before.response_complete):
            self._look_again()
        else:
            self.transport.abort()


class _Listener(socket.socket):
    """Has so many connections open, those in their handshakes too, and closes others as they come.

    They must not take the file descriptors that calls need.
    """

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(fileno=listener.detach())
        self._open: list[socket.socket] = []

    def accept(self) -> tuple[socket.socket, Any]:
        connection, where = super().accept()
        self._open = [each for each in self._open if each.fileno() >= 0]
        if len(self._open) >= _CONNECTIONS:
            connection.close()
            raise ConnectionAbortedError
        self._open.append(connection)
        return connection, where


class _Context(ssl.SSLContext):
    """Has each connection made by a context of the certificates as they are by then.

    To change a connection's context in its handshake would be too late: a session of before is
    known to the first one, and goes on without its client's certificate being looked at again.
    """

    _watched: WatchedFile[ssl.SSLContext]

    def __new__(cls, files: TlsFiles) -> _Context:
        context = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        paths = (files.cert, files.key, *([files.client_ca] if files.client_ca else []))
        context._watched = WatchedFile(lambda _: files.context(), *paths)
        return context

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self._watched.value.wrap_bio(*args, **kwargs)


class HttpServer:
    """Serves an application on one port."""

    def __init__(self, app: ASGIApp, where: str, files: TlsFiles | None = None) -> None:
        """Opens the port, so that it is known to be free; nothing is answered yet.

        Args:
            app: The application.
            where: `host:port`, `[::1]:port` or `unix:path`.
            files: The certificates, read again when they change; None for plain text.

        Raises:
            RuntimeError: The port cannot be had.
            ValueError: The certificates cannot be used.
        """
        context = _Context(files) if files else None
        self._socket = _Listener(_bind(where))
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,  # the log is the server's
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
        config.load()
        config.ssl = context
        self.url = f"{'https' if files else 'http'}://{_shown(self._socket)}"
        self._server = _Server(config)

    async def start(self) -> None:
        """Answers from now on."""
        self._task = start(self._server.serve([self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(_POLL_SECONDS)

    async def stop(self) -> None:
        """Answers what it was asked, and closes."""
        self._server.should_exit = True
        await asyncio.wait([self._task])
        self._socket.close()


def _bind(where: str) -> socket.socket:
    host, _, port = where.rpartition(":")
    try:
        if host == "unix":
            return socket.create_server(port, family=socket.AF_UNIX)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), int(port)), family=family)
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"cannot listen on {where}: {error}") from error


def _shown(listener: socket.socket) -> str:
    name = listener.getsockname()
    if listener.family is socket.AF_UNIX:
        return str(name)
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
