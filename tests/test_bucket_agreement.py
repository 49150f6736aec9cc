"""Shapes in which a row gets other bits are found before a model is served, and not used."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

from cache_scenario import forward, load, scenario
from checkpoints import GOLDEN, mesh_of, open_folder
from engine_double import BUCKETS as BUCKETS_OF_DOUBLE
from moorage_models.monitor import LoadMonitor
from moorage_server.engine import Batch, Bucket
from moorage_server.engine.agreement import agreeing
from moorage_server.engine.local import LocalEngine
from moorage_server.engine.outputs import Profile

BUCKETS = [Bucket(8, 1), Bucket(8, 2), Bucket(8, 4), Bucket(16, 1), Bucket(32, 2), Bucket(32, 4)]


def exact(batch: Batch) -> np.ndarray:
    """Hidden states that follow from each row alone."""
    return np.cos(np.cumsum(batch.tokens, axis=1))[..., None].astype(np.float32)


def test_shapes_that_agree_are_all_used() -> None:
    asked: list[Bucket] = []

    def trunk(batch: Batch) -> np.ndarray:
        asked.append(batch.bucket)
        assert batch.segments.all()
        assert batch.tokens.max() < 100
        return exact(batch)

    assert list(agreeing(BUCKETS[::-1], 100, trunk)) == BUCKETS
    assert sorted(asked) == [bucket for bucket in BUCKETS if bucket.length != 16]


@pytest.mark.parametrize("row", [0, 1])
def test_a_shape_with_one_other_bit_is_left_out(row: int) -> None:
    def trunk(batch: Batch) -> np.ndarray:
        hidden = exact(batch)
        if batch.bucket == Bucket(8, 2):
            hidden[row, 5] = np.nextafter(hidden[row, 5], 2)
        return hidden

    assert list(agreeing(BUCKETS, 100, trunk)) == [b for b in BUCKETS if b != Bucket(8, 2)]


def test_the_largest_shape_decides() -> None:
    def trunk(batch: Batch) -> np.ndarray:
        return exact(batch) + np.float32(batch.bucket == Bucket(32, 4))

    assert list(agreeing(BUCKETS, 100, trunk)) == [b for b in BUCKETS if b != Bucket(32, 2)]


def test_a_zero_of_another_sign_is_another_bit() -> None:
    def trunk(batch: Batch) -> np.ndarray:
        return exact(batch) * (-0.0 if batch.bucket.rows == 1 else 0.0)

    assert Bucket(8, 1) not in list(agreeing(BUCKETS, 100, trunk))


def test_an_engine_leaves_out_what_does_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the compiler had taken another order for one row: its program runs other weights."""
    buckets = [Bucket(32, 1), Bucket(32, 2), Bucket(64, 1)]
    engine = LocalEngine(mesh_of(1, 1), buckets, profiles=[Profile(("logprobs",))])
    engine.load("model", open_folder(GOLDEN / "llama3", "float32"), LoadMonitor())
    assert engine.prove("model") == tuple(buckets)
    programs = engine._models["model"].programs
    stored = programs.trunks[buckets[0]]

    def other(params, *batch):
        return stored(params | {"final_norm": params["final_norm"] * (1 + 1e-6)}, *batch)

    monkeypatch.setitem(programs.trunks, buckets[0], other)
    assert engine.prove("model") == (Bucket(32, 2), Bucket(64, 1))


@scenario
async def test_a_model_runs_in_what_was_proven_and_the_log_says_so(cache, engine):
    said = []
    kept = BUCKETS_OF_DOUBLE[1:]
    with (
        mock.patch("moorage_server.loader._log.info", lambda text, *words: said.append(words)),
        mock.patch.object(engine, "prove", return_value=kept),
    ):
        model = await load(cache)
    assert model.buckets == kept
    assert said == [(model.handle, "1x128")]
    assert await forward(cache, engine, model)


@scenario
async def test_a_proof_that_fails_leaves_nothing(cache, engine):
    engine.failures["prove"] = RuntimeError("no memory left")
    with pytest.raises(RuntimeError):
        await load(cache)
    assert (engine.loaded, cache.models(), cache.budget.reserved()) == (set(), [], 0)
    assert (await load(cache)).buckets
