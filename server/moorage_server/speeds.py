"""How fast models run, by the batches that ran. Pure: the clock is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moorage_server.engine import Bucket

#: For how many seconds a batch says how long the next one takes.
FRESH_SECONDS = 30.0

_SMOOTHING = 0.2  # weight of the latest batch


@dataclass
class _Speed:
    """Tokens a second, padding included: of late, at the best, and when that was last measured."""

    tokens: float
    best: float
    measured: float


class Speeds:
    """What was measured of batches, the latest of which count most.

    Attributes:
        pace: Tokens a second that were got through, as the queue counts them; 0 if none ran yet.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        """Makes one that knows nothing.

        Args:
            now: The clock, in seconds.
        """
        self.pace = 0.0
        self._now = now
        self._speeds: dict[tuple[str, Bucket], _Speed] = {}

    def note(self, handle: str, bucket: Bucket, tokens: int, seconds: float) -> None:
        """Takes note of a batch that ran.

        Args:
            handle: The model.
            bucket: The shape.
            tokens: How many tokens of the queue that were.
            seconds: How long it took.
        """
        seconds, key = max(seconds, 1e-6), (handle, bucket)
        full = bucket.rows * bucket.length / seconds
        fresh = {key: speed for key, speed in self._speeds.items() if self._is_new(speed)}
        earlier = fresh.get(key) or _Speed(full, full, self._now())
        fresh[key] = _Speed(_smoothed(earlier.tokens, full), max(earlier.best, full), self._now())
        self._speeds = fresh
        self.pace = _smoothed(self.pace or tokens / seconds, tokens / seconds)

    def seconds(self, handle: str, bucket: Bucket) -> float | None:
        """How long a batch takes, by the latest before it; None if that is too long ago.

        So one that was slow by chance counts for a while, and is tried again.
        """
        speed = self._speeds.get((handle, bucket))
        if speed is None or not self._is_new(speed):
            return None
        return bucket.rows * bucket.length / speed.tokens

    def least_seconds(self, handle: str, tokens: int, others: int) -> float | None:
        """How long a request takes at the least, after others; None if its model ran too long ago.

        By the quickest batch: others may have asked for more of the head.

        Args:
            handle: Its model.
            tokens: Its tokens, padding included.
            others: Those of any models that run before it.
        """
        fresh = [(key[0], speed.best) for key, speed in self._speeds.items() if self._is_new(speed)]
        own = [speed for model, speed in fresh if model == handle]
        return tokens / max(own) + others / max(speed for _, speed in fresh) if own else None

    def _is_new(self, speed: _Speed) -> bool:
        return self._now() - speed.measured <= FRESH_SECONDS


def _smoothed(earlier: float, latest: float) -> float:
    return earlier + _SMOOTHING * (latest - earlier)
