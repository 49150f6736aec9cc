"""An engine without devices: a test holds, releases and fails its loads and passes by name."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moorage_models.checkpoint import Checkpoint
from moorage_models.monitor import LoadMonitor
from moorage_models.plan import Plan
from moorage_server.engine import Answers, Batch, Bucket, Device, EngineInfo, Need, Probe, Question
from moorage_server.engine.outputs import PROFILES

STAGES = ("fetch", "place", "compile")
BYTES = {0: 600, 1: 400}
BUCKETS = (Bucket(128, 1), Bucket(128, 4), Bucket(512, 1))
_PATIENCE = 30.0  # seconds until a forgotten hold fails the test


class EngineDouble:
    """Passes named points: the stages of a load, then "loaded"; "forward"; "unload".

    At each it waits while the point is held and raises what it was told to. Stages are half done
    while they are held. `events` has the points in the order in which they were reached, and
    "forward ended". `room` models fit in its memory.
    """

    def __init__(self, room: int = 1 << 20) -> None:
        self.room = room
        self.events: list[str] = []
        self.held: set[str] = set()
        self.failures: dict[str, Exception] = {}
        self.loaded: set[str] = set()
        self._changed = threading.Condition()

    def hold(self, *points: str) -> None:
        self.held.update(points)

    def release(self, *points: str) -> None:
        with self._changed:
            self.held.difference_update(points or set(self.held))
            self._changed.notify_all()

    def count(self, point: str) -> int:
        return Counter(self.events)[point]

    def reached(self, point: str, times: int = 1) -> None:
        """Blocks until a point was reached so often."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.count(point) >= times, _PATIENCE), point

    def info(self) -> EngineInfo:
        devices = tuple(Device(number, "double") for number in BYTES)
        memory = self.room * max(BYTES.values()) + 50
        return EngineInfo("cpu", devices, {"fsdp": 1, "tp": 2}, BUCKETS, memory, PROFILES)

    def need(self, plan: Plan[Any], compute_dtype: str) -> Need:
        return Need(max(BYTES.values()), 50)

    def live_bytes(self) -> dict[int, int]:
        return {device: count * len(self.loaded) for device, count in BYTES.items()}

    def pool_bytes(self) -> int:
        return 0

    def load(self, handle: str, checkpoint: Checkpoint, monitor: LoadMonitor) -> dict[int, int]:
        for stage in STAGES:
            monitor.expect(stage, 100)
            monitor.advance(stage, 50)
            self._pass(stage, monitor.check)
            monitor.advance(stage, 50)
        self._pass("loaded")  # too late to be cancelled
        assert handle not in self.loaded, "loaded twice"
        self.loaded.add(handle)
        return dict(BYTES)

    def probe(self, handle: str, probe: Probe) -> list[bytes]:
        assert handle in self.loaded, "freed before it was tried"
        self._pass("probe")
        return [b"%d" % row for row in probe.rows]

    def unload(self, handle: str) -> dict[int, int]:
        self._pass("unload")
        self.loaded.remove(handle)
        return dict(BYTES)

    def forward(self, handle: str, batch: Batch, questions: Sequence[Question]) -> Answers:
        """Gives the negative of each token's id as every value after it."""
        assert handle in self.loaded, "freed before a forward pass began"
        self._pass("forward")
        assert handle in self.loaded, "freed while a forward pass ran"
        self.events.append("forward ended")
        return Answers(tuple(_negatives(batch, question) for question in questions), 0.0, 0.0)

    def compiles_after_ready(self) -> int:
        return 0

    def _pass(self, point: str, check: Callable[[], None] = lambda: None) -> None:
        begin = time.monotonic()
        with self._changed:
            self.events.append(point)
            self._changed.notify_all()
            while point in self.held:
                self._changed.wait(0.01)
                check()
                assert time.monotonic() - begin < _PATIENCE, f"{point} was never released"
        if failure := self.failures.pop(point, None):
            raise failure


def _negatives(batch: Batch, question: Question) -> dict[str, np.ndarray]:
    values = -batch.tokens.reshape(-1)[question.after]
    return {
        name: np.multiply.outer(values, np.ones(max(question.profile.size, 1))).astype(tensor.dtype)
        if name.startswith(("top_k", "candidates"))
        else values.astype(tensor.dtype)
        for name, tensor in question.profile.tensors(question.profile.outputs).items()
    }
