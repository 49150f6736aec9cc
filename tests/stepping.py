"""Threads and an engine that stop at every point until a test lets them go on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cache_scenario import wanted
from engine_double import STAGES, EngineDouble
from moorage_models.checkpoint import open_checkpoint
from moorage_models.sources import Policy
from moorage_server.engine import Need
from moorage_server.model import handle_of

CAPACITY = 1250
NEEDS = {
    "llama3": Need(600, 50),
    "gemma2": Need(500, 20),
    "qwen3_tied": Need(300, 100),
    "qwen2p5_tied": Need(650, 10),
    "llama3p2": Need(120, 0),
    "qwen3_f32": Need(5000, 0),  # never fits
}
CHECKPOINTS = {name: open_checkpoint(wanted(name), Policy()) for name in NEEDS}
HANDLES = {name: handle_of(CHECKPOINTS[name], EngineDouble().info().mesh) for name in NEEDS}
NEED_OF = {HANDLES[name]: need for name, need in NEEDS.items()}
POINTS = ("look", *STAGES, "loaded", "forward", "unload")


class Job(threading.Thread):
    """A call in a pool; it stops at every point until it is told to go on."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.future: Future[Any] = Future()
        self._call = call
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def step(self) -> None:
        """Lets it run to its next point, or its end."""
        if self.ident is None:
            if not self.future.set_running_or_notify_cancel():
                return
            self.start()
        self._go.release()
        assert self._back.acquire(timeout=30)

    def pause(self) -> None:
        self._back.release()
        self._go.acquire()

    def run(self) -> None:
        self._go.acquire()
        try:
            self.future.set_result(self._call())
        except Exception as error:
            self.future.set_exception(error)
        self._back.release()


class Pool(ThreadPoolExecutor):
    """Threads that the test runs, one step at a time."""

    def __init__(self, workers: int, name: str) -> None:
        super().__init__(workers, name)
        self._workers, self._jobs = workers, list[Job]()

    def submit(self, call, /, *args, **options):
        self._jobs.append(Job(functools.partial(call, *args, **options)))
        return self._jobs[-1].future

    def running(self) -> list[Job]:
        self._jobs = [job for job in self._jobs if not job.future.done()]
        return self._jobs[: self._workers]


class SteppedEngine(EngineDouble):
    """Keeps account of what is truly in memory, from the first byte of a load to the last.

    Attributes:
        placed: The models that are, or may be.
        faulty: Those whose load, or whose look by the journal's request, was made to fail.
        wrong: Assertions that failed in threads.
    """

    def __init__(self, in_use: Callable[[str], int]) -> None:
        super().__init__()
        self._in_use = in_use
        self.placed: set[str] = set()
        self.faulty: set[str] = set()
        self.wrong: list[AssertionError] = []
        self._raised: list[Exception] = []

    def info(self):
        return replace(super().info(), device_bytes=CAPACITY)

    def need(self, plan, compute_dtype):
        return next(NEEDS[n] for n, c in CHECKPOINTS.items() if c.plan.config == plan.config)

    def load(self, handle, checkpoint, monitor):
        with self._noted():
            assert handle not in self.placed, "two loads at once"
        self.placed.add(handle)
        try:
            with self._noted():
                assert total(self.placed) <= CAPACITY, "more than there is"
                with self._blaming(handle):
                    return super().load(handle, checkpoint, monitor)
        except Exception:
            self.placed.remove(handle)
            raise

    def forward(self, handle, batch, outputs):
        with self._noted():
            return super().forward(handle, batch, outputs)

    def unload(self, handle):
        try:
            with self._noted():
                assert not self._in_use(handle), "freed while somebody runs it"
                return super().unload(handle)
        finally:
            self.placed.remove(handle)
            self.loaded.discard(handle)

    def look(self, request, policy, **_):
        with self._blaming(HANDLES[request.model_id] if request.revision else ""):
            self._pass("look")
        return CHECKPOINTS[request.model_id]

    def _pass(self, point, check=lambda: None):
        self.events.append(point)
        job = threading.current_thread()
        assert isinstance(job, Job)
        job.pause()
        check()
        if failure := self.failures.pop(point, None):
            self._raised.append(failure)
            raise failure

    @contextmanager
    def _blaming(self, handle: str) -> Iterator[None]:
        """Notes that a model has met a failure that it was told to."""
        try:
            yield
        except Exception as error:
            if any(error is failure for failure in self._raised):
                self.faulty.add(handle)
            raise

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """A failed assertion would pass for a failed load."""
        try:
            yield
        except AssertionError as error:
            self.wrong.append(error)
            raise


def total(handles) -> int:
    """Bytes that models take together: all weights, and the largest temporaries once."""
    needs = [NEED_OF[handle] for handle in handles]
    return sum(n.weights for n in needs) + max((n.temporaries for n in needs), default=0)
