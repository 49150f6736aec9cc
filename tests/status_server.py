"""A server with its status page, in the event loop of a test, and what one may ask of it."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families

from moorage_models.sources import Policy
from moorage_server.access import Access
from moorage_server.cache import ModelCache
from moorage_server.engine import Engine
from moorage_server.metrics import registry
from moorage_server.serving import Server, make_server
from moorage_server.status_page import StatusPage
from moorage_server.tls import TlsFiles
from server_thread import SOURCES


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        code: The HTTP status.
        headers: By name, in small letters.
        text: The body.
    """

    code: int
    headers: Mapping[str, str]
    text: str


@dataclass(frozen=True)
class StatusServer:
    """A running server.

    Attributes:
        server: The server.
        page: Its status page.
        address: host:port of its gRPC listener.
    """

    server: Server
    page: StatusPage
    address: str

    async def get(
        self, path: str, *, method: str = "GET", context: Any = None, **headers
    ) -> Answer:
        """Asks for a path; names of headers have `_` for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = Request(self.page.url + path, method=method, headers=named)
        return await asyncio.to_thread(_ask, request, context)

    async def metrics(self) -> dict[str, float]:
        """Every sample, as `name{label="value"}`."""
        families = text_string_to_metric_families((await self.get("/metrics")).text)
        return {_name_of(s): s.value for family in families for s in family.samples}

    async def status(self) -> dict[str, Any]:
        """status.json."""
        found: dict[str, Any] = json.loads((await self.get("/status.json")).text)
        return found


def _ask(request: Request, context: ssl.SSLContext | None) -> Answer:
    try:
        with urlopen(request, timeout=10, context=context) as response:
            code, headers, body = response.status, response.headers, response.read()
    except HTTPError as error:
        with error:
            code, headers, body = error.code, error.headers, error.read()
    return Answer(code, {k.lower(): v for k, v in headers.items()}, body.decode())


def _name_of(sample: Any) -> str:
    labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
    return f"{sample.name}{{{labels}}}" if labels else sample.name


@asynccontextmanager
async def status_server(
    engine: Engine, *roots: Path, tokens: Path | None = None, tls: TlsFiles | None = None
) -> AsyncIterator[StatusServer]:
    """Serves directories under some roots, gRPC in plain text and the page as `tls` says."""
    policy, access = Policy(SOURCES, roots), Access(tokens)
    cache = ModelCache(engine, policy)
    server = make_server(cache, engine, policy, access=access)
    address = f"127.0.0.1:{server.grpc.add_insecure_port('127.0.0.1:0')}"
    metrics = registry(server.about, cache.activity.histograms)
    page = StatusPage(server.about, metrics, access, "127.0.0.1:0", tls)
    await server.grpc.start()
    await page.start()
    try:
        yield StatusServer(server, page, address)
    finally:
        cache.stop()
        await server.grpc.stop(0)
        await page.stop()
