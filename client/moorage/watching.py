"""The loop of `moorage ps --watch`: asks, and draws on a terminal or prints."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Never

from rich.console import Console, Group
from rich.live import Live

from moorage.client import Client
from moorage.errors import Error
from moorage.live import Snapshot, picture
from moorage.render import document
from moorage.transport import Resumption

_PERIOD = 1.0  # seconds between two questions while nothing changes
_SHORTEST = 0.25  # seconds between two questions while much changes


def watch(client: Client, *, as_json: bool) -> Never:
    """Shows how a server is until it is interrupted.

    Args:
        client: Its client.
        as_json: Print a JSON document, on one line, for each change. Otherwise a terminal is drawn
            on, and anything else gets plain text for each change.

    Raises:
        Error: The server did not answer at first, or refuses to.
    """
    console = Console()
    if as_json:
        _print(client, document)
    if not sys.stdout.isatty() or not console.is_interactive:
        _print(client, plain)
    _draw(client, console)


def snapshots(client: Client) -> Iterator[Snapshot]:
    """Asks how a server is: once a second, and as soon as a model changes.

    Args:
        client: Its client.

    Yields:
        How it is; while it does not answer, how it was, and why it does not.

    Raises:
        Error: The server did not answer at first, or refuses to.
    """
    changed, listener = threading.Event(), threading.Thread()
    resumption = Resumption(math.inf, time.monotonic, patience=math.inf, answered=True)
    latest, pause = _ask(client), _PERIOD
    while True:
        yield latest
        if not listener.is_alive():
            listener = threading.Thread(target=_listen, args=(client, changed), daemon=True)
            listener.start()
        time.sleep(_SHORTEST)  # what changes meanwhile is seen at once
        changed.wait(pause - _SHORTEST)
        changed.clear()
        try:
            latest, pause = _ask(client), _PERIOD
            resumption.answered()
        except Error as error:
            pause = resumption.pause(error)
            latest = replace(latest, error=latest.error or str(error))


def plain(seen: Snapshot) -> str:
    """Writes how a server is, without colours, as wide as the terminal, or else 100 characters."""
    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(f"{seen.time:%Y-%m-%d %H:%M:%S} UTC")
        console.print(picture(seen, width, datetime.now(UTC)))
    return capture.get()


def _print(client: Client, write: Callable[[Snapshot], str]) -> Never:
    asked, last = snapshots(client), None
    while True:
        if (seen := next(asked)) != last:
            print(write(seen), flush=True)
        last = seen


def _draw(client: Client, console: Console) -> Never:
    asked = snapshots(client)
    seen = next(asked)

    def draw() -> Group:
        return picture(seen, console.width, datetime.now(UTC), console.height)

    with Live(get_renderable=draw, console=console, screen=True):
        while True:
            seen = next(asked)


def _ask(client: Client) -> Snapshot:
    return Snapshot(client.address, client.info(), tuple(client.models()))


def _listen(client: Client, changed: threading.Event) -> None:
    with suppress(Error, ValueError):  # ValueError is gRPC's word for a closed channel
        for _ in client.watch():
            changed.set()
