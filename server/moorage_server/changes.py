"""The latest changes of models, numbered, for those who watch."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

#: Changes that are kept for watchers who come back.
_KEPT = 1024


@dataclass(frozen=True)
class Change(Generic[T]):
    """One change.

    Attributes:
        sequence: Its number; the next change has the next.
        value: What is new.
    """

    sequence: int
    value: T


class Changes(Generic[T]):
    """A log of changes; everything here runs in one event loop.

    Attributes:
        epoch: Names this log: numbers of another mean nothing here.
        sequence: The number of the latest change; 0 if there was none.
    """

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(8)
        self.sequence = 0
        self._latest: deque[Change[T]] = deque(maxlen=_KEPT)
        self._changed = asyncio.Event()

    def add(self, value: T) -> None:
        """Numbers a change, and wakes who watches."""
        self.sequence += 1
        self._latest.append(Change(self.sequence, value))
        self._changed.set()
        self._changed = asyncio.Event()

    def covers(self, epoch: str, sequence: int) -> bool:
        """Whether all changes after one are kept, so that its watcher can go on from there."""
        known = self.sequence - len(self._latest) <= sequence <= self.sequence
        return epoch == self.epoch and known

    async def after(
        self, sequence: int, heartbeat: float
    ) -> AsyncGenerator[Change[T] | None, None]:
        """Yields every change after one; None after so many seconds without any.

        Ends if the caller is so slow that changes were dropped that it has not seen.
        """
        while self.covers(self.epoch, sequence):
            changed = self._changed
            for change in [change for change in self._latest if change.sequence > sequence]:
                sequence = change.sequence
                yield change
            if sequence == self.sequence:
                try:
                    async with asyncio.timeout(heartbeat):
                        await changed.wait()
                except TimeoutError:
                    yield None
