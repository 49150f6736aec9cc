"""The same row, the same bits.

Through the engine, whose programs are compiled with the options that the promise needs. A bucket's
rows are counted for each data-parallel device, so another number of devices means the same shape on
each. Between buckets the bits hold for models of a real width only: for tiny ones the CPU's
compiler takes other kernels by size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import real_models
from checkpoints import GOLDEN, VARIANTS, mesh_of, open_folder
from moorage_models.monitor import LoadMonitor
from moorage_server.engine import Bucket
from moorage_server.engine.local import LocalEngine
from moorage_server.engine.outputs import served
from moorage_server.scoring import make_rows, score

SIZES = (1, 2, 4, 8)
QUICK = [("qwen3_moe", "float32", (1, 4)), ("gemma3_text_mqa", "bfloat16", (1, 4))]
SLOW = [
    pytest.param(name, dtype, SIZES, marks=pytest.mark.soak)
    for name in VARIANTS
    for dtype in ("float32", "bfloat16")
]


def rows_of(vocabulary: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, vocabulary - 12, length).tolist() for length in lengths]


def scores(
    engine: LocalEngine, config: Any, rows: list[list[int]], buckets: list[Bucket]
) -> list[np.ndarray]:
    """The bits of the first output of every row, in the order of `rows`."""
    output = served(config)[0]
    lengths = [len(row) for row in rows]
    packed = make_rows(np.concatenate(rows).tolist(), lengths, [])

    def run(batch: Any, outputs: Any) -> Any:
        return engine.forward("model", batch, outputs)

    found = score(packed, config, [output], buckets, run)[output]
    return np.split(found.view(np.int32), np.cumsum(lengths)[:-1])


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return all(np.array_equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "dtype", "sizes"), [*QUICK, *SLOW])
def test_whatever_the_neighbours_and_the_devices(
    name: str, dtype: str, sizes: tuple[int, ...]
) -> None:
    checkpoint = open_folder(GOLDEN / name, dtype, dtype)
    rows = rows_of(checkpoint.config.vocab_size, (5, 72, 128, 17, 40, 64, 99, 3))
    wanted: list[np.ndarray] | None = None
    for size in sizes:
        buckets = [Bucket(128, 4 * size)]
        engine = LocalEngine(mesh_of(size, 1), buckets)
        engine.load("model", checkpoint, LoadMonitor())
        together = scores(engine, checkpoint.config, rows, buckets)
        wanted = wanted or together
        assert same(together, wanted), size
        assert same(scores(engine, checkpoint.config, rows[::-1], buckets)[::-1], wanted), size
        alone = [scores(engine, checkpoint.config, [row], buckets)[0] for row in rows[:3]]
        assert same(alone, wanted[:3]), size


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whatever_the_bucket_of_a_real_model(dtype: str) -> None:
    checkpoint = open_folder(real_models.make("smollm2-135m-instruct"), dtype, dtype)
    rows = rows_of(checkpoint.config.vocab_size, (5, 100, 128, 60))
    wanted: list[np.ndarray] | None = None
    for size in (1, 2):
        buckets = [Bucket(128, size), Bucket(128, 4 * size), Bucket(512, 2 * size)]
        engine = LocalEngine(mesh_of(size, 1), buckets)
        engine.load("model", checkpoint, LoadMonitor())
        for bucket in buckets:
            found = scores(engine, checkpoint.config, rows, [bucket])
            wanted = wanted or found
            assert same(found, wanted), (size, bucket)
