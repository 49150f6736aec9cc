"""Five hundred requests of a server that is killed and started again, on one to eight devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moorage
from checkpoints import make_wide
from server_process import server_process

SIZES = (1, 2, 4, 8)
LIVES = 2
LONGEST = 128  # the context of what make_wide makes
SHAPES = f"1x{LONGEST},4x{LONGEST},16x{LONGEST}"  # of each device
OUTPUTS = ("logprobs", "entropy")

Rows = list[list[int]]


def some_rows(rng: np.random.Generator, vocabulary: int) -> Rows:
    lengths = rng.integers(1, LONGEST + 1, rng.integers(1, 4))
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]


def bits(scores: moorage.Scores) -> bytes:
    assert scores.logprobs is not None
    assert scores.entropy is not None
    return b"".join(row.tobytes() for row in [*scores.logprobs, *scores.entropy])


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_over_restarts(tmp_path: Path, dtype: str) -> None:
    make_wide(tmp_path / "models" / "wide", "qwen3_untied")
    rng, expected = np.random.default_rng(3), []
    asked: list[Rows] = []
    for devices in SIZES:
        for life in range(LIVES):
            with (
                server_process(
                    tmp_path / "models",
                    tmp_path,
                    mesh=f"fsdp={devices},tp=1",
                    buckets=SHAPES,
                    outputs=",".join(OUTPUTS),
                ) as server,
                moorage.connect(server.address) as client,
            ):
                model = client.load("qwen3", "internal", "wide", dtype=dtype)
                if not expected:
                    asked = [some_rows(rng, model.config.vocab_size) for _ in range(500)]
                    expected = [bits(model.forward(rows, OUTPUTS)) for rows in asked]
                futures = {
                    i: model.forward_async(asked[i], OUTPUTS) for i in rng.permutation(len(asked))
                }
                differing = [i for i in futures if bits(futures[i].result()) != expected[i]]
                assert differing == [], (devices, life)
                server.kill()
