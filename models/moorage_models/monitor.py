"""How far a load has come, and whether it is still wanted."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from moorage_models.errors import ModelError, Reason


@dataclass(frozen=True)
class Stage:
    """Progress of one stage of a load.

    Attributes:
        done: Units done: bytes for `fetch` and `place`, programs for `compile`, batches to `prove`.
        total: Units in all; 0 while that is unknown.
        seconds: Time from its first unit to its last.
    """

    done: int = 0
    total: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.done / self.seconds if self.seconds else 0.0


@dataclass
class LoadMonitor:
    """Counts the stages of one load, which run side by side in several threads."""

    _stages: dict[str, Stage] = field(default_factory=dict)
    _starts: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def expect(self, stage: str, total: int) -> None:
        """Says how much a stage will be."""
        with self._lock:
            self._starts[stage] = time.monotonic()
            self._stages[stage] = Stage(0, total)

    def advance(self, stage: str, count: int) -> None:
        """Counts units that are done.

        Raises:
            ModelError: LOAD_CANCELLED once the load was cancelled.
        """
        self.check()
        with self._lock:
            old = self._stages[stage]
            done = min(old.done + count, old.total)
            seconds = time.monotonic() - self._starts[stage]
            self._stages[stage] = Stage(done, old.total, seconds)

    def cancel(self) -> None:
        """Stops the load at its next step."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises LOAD_CANCELLED once the load was cancelled."""
        if self._cancelled.is_set():
            raise ModelError(Reason.LOAD_CANCELLED, "the load was cancelled")

    def stages(self) -> dict[str, Stage]:
        """A snapshot of all stages."""
        with self._lock:
            return dict(self._stages)
