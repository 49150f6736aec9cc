"""Counts compiles where none should be."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts what a thread compiles while it says that it should not.

    Attributes:
        count: How many programs that were.
    """

    def __init__(self) -> None:
        self.count = 0
        self._here = threading.local()
        counter = weakref.ref(self)  # jax keeps a listener for good

        def on_event(event: str, duration_secs: float, **_: Any) -> None:
            if event == _COMPILE_EVENT and (alive := counter()):
                alive._compiled()

        jax.monitoring.register_event_duration_secs_listener(on_event)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what this thread compiles in the block."""
        self._here.counts = True
        try:
            yield
        finally:
            self._here.counts = False

    def _compiled(self) -> None:
        self.count += getattr(self._here, "counts", False)
