"""HTTP servers on loopback that stand for hubs: a log of requests, and the ways they fail."""

from __future__ import annotations

import fnmatch
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Generic, Protocol, Self, TypeVar

Headers = dict[str, str]

_PIECE_BYTES = 1 << 12


@dataclass
class Fault:
    """What goes wrong with the requests whose line matches a pattern.

    Attributes:
        pattern: As `fnmatch` has it.
        status: A status that is answered instead.
        cut: Bytes of body after which the connection breaks.
        stall: Bytes of body after which nothing more is sent; with 0 not even a header is.
        flip: Place of a byte of the file that is inverted.
        length: Bytes of the file that there seem to be.
        generation: The generation that the answer seems to be of, in a bucket.
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

    def damaged(self, content: bytes) -> bytes:
        """The content of a file as it is sent in place of the right one."""
        if self.flip is not None:
            at = self.flip % len(content)
            content = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        return content[: self.length]


class Logged(Protocol):
    """A request as a log keeps it."""

    @property
    def line(self) -> str: ...

    @property
    def sent(self) -> int: ...


R = TypeVar("R", bound=Logged)


class Loopback(Generic[R]):
    """One service, which serves while it is entered.

    Attributes:
        urls: Where it serves, one a host name.
        faults: What goes wrong.
        log: The requests, in the order in which their answers began.
        pause: Seconds between the pieces of a body.
        most: Bytes of all bodies after which each stalls.
        spent: Set once one does.
        closed: Ends what stalls.
    """

    def __init__(self, handler: type[Handler], hosts: Sequence[str] = ("127.0.0.1",)) -> None:
        self.faults: list[Fault] = []
        self.log: list[R] = []
        self.pause = 0.0
        self.most = 1 << 60
        self.spent = threading.Event()
        self._counting = threading.Lock()
        self.closed = threading.Event()
        own = type("Handler", (handler,), {"hub": self})
        self._servers = [_Server(("127.0.0.1", 0), own) for _ in hosts]
        pairs = zip(hosts, self._servers, strict=True)
        self.urls = [f"http://{host}:{server.server_port}" for host, server in pairs]

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def lines(self, pattern: str = "*") -> list[str]:
        """The requests that match."""
        return [r.line for r in self.log if fnmatch.fnmatchcase(r.line, pattern)]

    def sent(self, pattern: str = "*") -> int:
        """Bytes of body that were sent to requests that match."""
        return sum(r.sent for r in self.log if fnmatch.fnmatchcase(r.line, pattern))

    def allowed(self, count: int) -> int:
        """How many of a body's next bytes may be sent, which then count."""
        with self._counting:
            count = min(count, self.most)
            self.most -= count
        return count

    def next_fault(self, line: str) -> Fault:
        """What goes wrong with a request: nothing, if no fault is left for it."""
        for fault in self.faults:
            if fault.times > 0 and fnmatch.fnmatchcase(line, fault.pattern):
                fault.times -= 1
                return fault
        return Fault("")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the service's."""


class Handler(BaseHTTPRequestHandler):
    """Answers requests of a service, `hub`, without a word."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    hub: Loopback[Any]

    def log_message(self, *args: Any) -> None:
        pass

    def send_body(self, content: bytes) -> None:
        """Sends a body at the service's pace, and no more than it may send."""
        for start in range(0, len(content), _PIECE_BYTES):
            piece = content[start : start + _PIECE_BYTES]
            count = self.hub.allowed(len(piece))
            self.wfile.write(piece[:count])
            if count < len(piece):
                self.hub.spent.set()
                self.hub.closed.wait()
            time.sleep(self.hub.pause)
