"""The one thread that runs on the devices: work in order, and for how long it has been at it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DeviceThread:
    """Runs one thing at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "device")
        self._since: float | None = None

    @property
    def busy_seconds(self) -> float:
        """How long it has been at what it does now; 0 if it has nothing to do."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    async def run(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Has something done, behind all that was asked for before.

        What has begun goes on if the caller leaves.
        """

        def timed() -> T:
            self._since = time.monotonic()
            try:
                return action(*args, **kwargs)
            finally:
                self._since = None

        return await asyncio.get_running_loop().run_in_executor(self._pool, timed)
