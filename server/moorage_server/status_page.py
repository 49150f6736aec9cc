"""The status page and /metrics: what ServerService says, by HTTP, to be looked at only."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from moorage.v1 import moorage_pb2 as pb
from moorage_server import parsing
from moorage_server.access import Access
from moorage_server.errors import ServerError
from moorage_server.http_server import HttpServer
from moorage_server.server_service import ServerService
from moorage_server.tls import TlsFiles

_STATIC = Path(__file__).parent / "static"
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_TICK_SECONDS = 1.0
_TICKS = 900  # of one stream: then its browser opens the next, for which its token must still hold

#: What every answer carries, refusals too.
HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class StatusPage:
    """Answers browsers, and whoever collects metrics.

    Attributes:
        url: Where.
    """

    def __init__(
        self,
        about: ServerService,
        registry: CollectorRegistry,
        access: Access,
        where: str,
        files: TlsFiles | None = None,
    ) -> None:
        """Opens the port; nothing is answered yet.

        Args:
            about: What the server says of itself.
            registry: Its metrics.
            access: Who may read: every token there is.
            where: `host:port`.
            files: The certificates; None for plain text.

        Raises:
            RuntimeError: The port cannot be had.
            ValueError: The certificates cannot be used.
        """
        self._about = about
        self._registry = registry
        self._files = {
            path.name: (path.read_bytes(), _MEDIA_TYPES[path.suffix]) for path in _STATIC.iterdir()
        }
        self._stopped = asyncio.Event()
        self._shared, self._shared_at = b"", -_TICK_SECONDS
        routes = [
            Route("/", self._file),
            Route("/static/{name}", self._file),
            Route("/status.json", self._status),
            Route("/events", self._events),
            Route("/metrics", self._metrics),
        ]
        app = _Guard(Router(routes, redirect_slashes=False), access, parsing.is_local(where))
        self._http = HttpServer(app, where, files)
        self.url = self._http.url

    async def start(self) -> None:
        """Answers from now on."""
        await self._http.start()

    async def stop(self) -> None:
        """Ends the streams, and closes."""
        self._stopped.set()
        await self._http.stop()

    async def _file(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            return PlainTextResponse("there is no such file\n", 404)
        content, media_type = self._files[name]
        return Response(content, media_type=media_type)

    async def _status(self, _: Request) -> Response:
        return Response(self._json(), media_type="application/json")

    async def _events(self, _: Request) -> Response:
        return StreamingResponse(self._ticks(), media_type="text/event-stream")

    async def _metrics(self, request: Request) -> Response:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), media_type=media_type)

    async def _ticks(self) -> AsyncIterator[bytes]:
        """The status each second; all who listen share one."""
        for _ in range(_TICKS):
            if time.monotonic() - self._shared_at >= _TICK_SECONDS:
                self._shared, self._shared_at = self._json(), time.monotonic()
            yield b"data: " + self._shared + b"\n\n"
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), _TICK_SECONDS)
                return

    def _json(self) -> bytes:
        """The server, and each model with its layout, as the rpc gives them; on one line."""
        models = [
            pb.GetModelResponse(model=model, layout=self._about.layout(model.handle))
            for model in self._about.models()
        ]
        status = {
            "time": datetime.now(UTC).isoformat(),
            "server": _to_dict(self._about.describe()),
            "models": [_to_dict(model) for model in models],
        }
        return json.dumps(status).encode()


class _Guard:
    """Lets those pass who may read, and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, access: Access, is_local: bool) -> None:
        self._app = app
        self._access = access
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(event: Event) -> None:
            if event["type"] == "http.response.start":
                MutableHeaders(scope=event).update(HEADERS)
            await send(event)

        refused = self._refused(Request(scope))
        await (refused or self._app)(scope, receive, send_with_headers)

    def _refused(self, request: Request) -> Response | None:
        # Against pages elsewhere whose name was made to lead here, to be read by a browser here.
        if self._is_local and not parsing.is_local(request.headers.get("host", "")):
            return PlainTextResponse("ask for this page as localhost\n", 421)
        try:
            self._access.caller(_bearer(request), str(request.client))
        except ServerError as error:
            challenge = {"WWW-Authenticate": 'Basic realm="moorage: a token as the password"'}
            return PlainTextResponse(f"{error.message}\n", 401, challenge)
        return None


def _bearer(request: Request) -> str:
    """The authorization as calls carry it; a browser's has the token as its password."""
    given = request.headers.get("authorization", "")
    scheme, _, rest = given.partition(" ")
    if scheme.lower() != "basic":
        return given
    try:
        password = base64.b64decode(rest, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return f"Bearer {password}"


def _to_dict(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return found
