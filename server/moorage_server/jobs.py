"""A request that was taken: what of it waits, runs and is done."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from moorage_server.engine import Bucket
from moorage_server.model import Model
from moorage_server.scoring import Piece, Work

#: What rows that run together share: the model, the length they are padded to, and the layer.
Shape: TypeAlias = tuple[str, int, int | None]

_TOKEN_BYTES, _JOB_BYTES = 40, 8 << 10  # about what is known of a token, and of a request


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        model: What it is for.
        client: Who asks; clients get equal shares of the devices.
        work: What is asked, and the answer.
        buckets: The model's compiled shapes.
        request_id: Under which its caller may come back; empty if it cannot.
        taken: When it was taken, in seconds.
        started: When its first row ran, or None.
        turn: Those of its client that have a lower number come before it.
        waiting: The rows that wait, by the length that they are padded to.
        tokens: How many tokens that is, padding included.
        running: How many of its rows run.
        callers: How many wait for it, or take the answer.
        answered: Whether one of them has got it.
        finished: Set once it is done or has failed.
        error: Why it failed.
    """

    model: Model
    client: str
    work: Work
    buckets: Sequence[Bucket]
    request_id: str = ""
    taken: float = 0.0
    started: float | None = None
    turn: float = 0.0
    waiting: dict[int, deque[int]] = field(default_factory=dict)
    tokens: int = 0
    running: int = 0
    callers: int = 0
    answered: bool = False
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None

    def __post_init__(self) -> None:
        rows = np.array(self.work.runnable(), np.int64)
        lengths = sorted({bucket.length for bucket in self.buckets})
        padded = np.searchsorted(lengths, np.array(self.work.rows.lengths)[rows])
        for i, length in enumerate(lengths):
            if own := rows[padded == i].tolist():
                self.waiting[length] = deque(own)
                self.tokens += length * len(own)
        self.settle()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes, about: those of the answer, and all the rest."""
        return self.work.nbytes + _TOKEN_BYTES * len(self.work.rows.tokens) + _JOB_BYTES

    @property
    def is_put_aside(self) -> bool:
        """Nobody waits for it, and it is not done: it does not wait for the devices, either."""
        return not self.callers and not self.finished.is_set()

    @property
    def rows_left(self) -> int:
        """How many of its rows wait or run."""
        return self.running + sum(map(len, self.waiting.values()))

    def shape(self, length: int) -> Shape:
        """What its rows of a length share with those that may run beside them."""
        return self.model.handle, length, self.work.wanted.layer

    def take(self, length: int) -> Piece:
        """Takes out a row of a length, to run it."""
        piece = Piece(self.work, self.waiting[length].popleft())
        self.tokens -= length
        self.running += 1
        if not self.waiting[length]:
            del self.waiting[length]
        return piece

    def settle(self, rows: int = 0) -> None:
        """Takes note that rows have run."""
        self.running -= rows
        if not self.rows_left:
            self.finished.set()

    def fail(self, error: Exception) -> None:
        """Ends it without an answer."""
        self.error = self.error or error
        self.waiting.clear()
        self.tokens = 0
        self.finished.set()

    def result(self) -> Work:
        """The answer, once it is finished.

        Raises:
            ServerError: NON_FINITE_OUTPUT; or whatever else it failed with.
        """
        if self.error:
            raise self.error
        self.work.check()
        return self.work
