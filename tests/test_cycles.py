"""Loads that end in every way, over and over: nothing is left of them."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from cache_scenario import load, wanted
from checkpoints import mesh_of
from moorage_models import automodel
from moorage_models.errors import ModelError
from moorage_models.sources import Policy
from moorage_server.cache import ModelCache
from moorage_server.engine import Batch, Bucket, Question
from moorage_server.engine.local import LocalEngine
from moorage_server.engine.outputs import PROFILES

REQUEST = wanted("qwen3_tied", compute_dtype="float32")
#: Threads that the event loop and the cache keep, a bounded number.
POOLS = ("asyncio_", "load_", "device_")

BATCH = Batch(
    np.ones((2, 128), np.int32),
    np.ones((2, 128), np.int32),
    np.tile(np.arange(128, dtype=np.int32), (2, 1)),
)
EVERY = np.arange(256, dtype=np.int32)
QUESTION = Question(
    PROFILES[0], EVERY, EVERY, np.ones(256, np.float32), np.zeros((256, 0), np.int32)
)


class Cycles:
    """A cache on real devices, and the ways in which a load may end."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.engine = LocalEngine(mesh_of(2, 2), [Bucket(128, 2)], profiles=PROFILES[:1])
        self.cache = ModelCache(self.engine, Policy())

    async def one(self) -> None:
        way = self.random.choice([self.unload, self.unload, self.cancel, self.fail])
        await way()
        assert self.cache.models() == []
        assert self.cache.budget.reserved() == 0

    async def unload(self) -> None:
        model = await load(self.cache, REQUEST)
        answers = await self.cache.device_thread.run(
            self.engine.forward, model.handle, BATCH, [QUESTION]
        )
        assert np.isfinite(answers.tensors[0]["logprobs"]).all()
        assert await self.cache.unload(model.handle) == model.device_bytes

    async def cancel(self) -> None:
        loading = asyncio.create_task(load(self.cache, REQUEST))
        await asyncio.sleep(self.random.random() * 0.06)
        while not self.cache.models() and not loading.done():
            await asyncio.sleep(0.001)
        for model in self.cache.models():
            await self.cache.unload(model.handle)
        await asyncio.wait([loading])
        assert loading.exception() is None or isinstance(loading.exception(), ModelError)

    async def fail(self) -> None:
        place = automodel.place

        def fails(*arguments: Any) -> Any:
            if self.random.random() < 0.5:
                place(*arguments)
            raise OSError("injected")

        with mock.patch.object(automodel, "place", fails), pytest.raises(OSError, match="injected"):
            await load(self.cache, REQUEST)


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def left() -> dict[str, int]:
    """What a load may leave behind, counted."""
    gc.collect()
    return {
        "arrays": sum(array.nbytes for array in jax.live_arrays()),
        "threads": sum(not t.name.startswith(POOLS) for t in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
    }


@pytest.mark.parametrize(
    ("warm_up", "count"), [(10, 15), pytest.param(200, 1000, marks=pytest.mark.soak)]
)
def test_nothing_is_left_of_loads(
    warm_up: int, count: int, caplog: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # which no other test writes to
    caplog.set_level("CRITICAL")  # pytest keeps tracebacks, whose frames hold arrays

    async def run() -> None:
        cycles = Cycles(seed=count)
        for _ in range(warm_up):
            await cycles.one()
        await asyncio.sleep(0.5)  # for threads that end behind a cancelled load
        before, memory = left(), resident()
        for _ in range(count):
            await cycles.one()
        end, after = time.monotonic() + 20, left()
        while after["arrays"] != before["arrays"] and time.monotonic() < end:
            await asyncio.sleep(0.1)  # for threads that end behind a cancelled load
            after = left()
        assert after["arrays"] == before["arrays"]
        # What earlier tests of this process left may end meanwhile.
        assert all(after[kind] <= before[kind] for kind in before), (before, after)
        if count >= 1000:
            assert resident() - memory < count * 10_000

    asyncio.run(run())
