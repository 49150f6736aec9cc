"""Fifty clients that want three models where two fit, over the wire."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from conftest import GOLDEN
from engine_double import EngineDouble
from many_clients import ask_all
from server_thread import serving

CLIENTS = 50
PROCESSES = 8


class CountingEngine(EngineDouble):
    """Two models fit; counts residencies, each from the first byte of a load to the last.

    Attributes:
        begun: How many there have been, by handle.
        ended: How many are over.
    """

    def __init__(self) -> None:
        super().__init__(room=2)
        self.begun: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()

    def load(self, handle, checkpoint, monitor):
        assert self.begun[handle] == self.ended[handle], "two loads at once"
        self.begun[handle] += 1
        return super().load(handle, checkpoint, monitor)

    def unload(self, handle):
        freed = super().unload(handle)
        self.ended[handle] += 1
        return freed

    def check(self) -> None:
        """One fetch and one placement a residency; what is there now is what was not freed."""
        assert self.begun - self.ended == Counter(self.loaded)
        assert len(self.loaded) <= 2
        total = self.begun.total()
        assert [self.count(point) for point in ("fetch", "place", "loaded")] == [total] * 3


def check_told(told: Counter[str], seed: int) -> None:
    """Everybody has what was asked for, or a reason why not."""
    assert told.total() == CLIENTS
    assert set(told) <= {"scores", "DEVICE_BUDGET_EXCEEDED", "MODEL_NOT_LOADED"}, seed
    assert told["scores"] >= 2, seed


def test_every_client_gets_its_model_or_is_told_why_not() -> None:
    engine = CountingEngine()
    with serving(engine, GOLDEN) as server:
        for seed in range(3):
            check_told(ask_all(server.address, GOLDEN, seed, range(CLIENTS)), seed)
            engine.check()
    assert engine.ended.total() > 0


@pytest.mark.soak
def test_fifty_clients_in_eight_processes() -> None:
    engine, told, begin = CountingEngine(), Counter[str](), time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    parts = [range(first, CLIENTS, PROCESSES) for first in range(PROCESSES)]
    with serving(engine, GOLDEN) as server, ProcessPoolExecutor(PROCESSES, spawn) as pool:
        for seed in range(200):
            asked = [pool.submit(ask_all, server.address, GOLDEN, seed, part) for part in parts]
            answers = sum((part.result(60) for part in asked), Counter[str]())
            check_told(answers, seed)
            engine.check()
            told += answers
    seconds = time.monotonic() - begin
    print(f"{dict(told)}, {engine.begun.total()} residencies, {seconds:.0f} s")
    assert engine.ended.total() > 100
    assert seconds < 900
