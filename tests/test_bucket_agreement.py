"""Shapes in which a row gets other bits are found before a model is served, and not used."""

from __future__ import annotations

import asyncio
from unittest import mock

import numpy as np
import pytest

from cache_scenario import forward, load, reached, scenario
from checkpoints import GOLDEN, mesh_of, open_folder
from engine_double import BUCKETS as BUCKETS_OF_DOUBLE
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_server.convert import to_model
from moorage_server.engine import Bucket
from moorage_server.engine.agreement import Digests, agreeing, disputed, probe, proven
from moorage_server.engine.local import LocalEngine
from moorage_server.engine.outputs import Profile

BUCKETS = [Bucket(8, 1), Bucket(8, 2), Bucket(8, 4), Bucket(16, 1), Bucket(32, 2), Bucket(32, 4)]
SAME: Digests = frozenset([b"one"])


def test_only_shapes_that_share_their_length_are_tried() -> None:
    assert disputed(BUCKETS[::-1]) == [bucket for bucket in BUCKETS if bucket.length != 16]


def test_shapes_that_agree_are_all_used() -> None:
    assert agreeing(BUCKETS[::-1], dict.fromkeys(disputed(BUCKETS), SAME)) == tuple(BUCKETS)


@pytest.mark.parametrize("other", [frozenset([b"other"]), frozenset([b"one", b"other"])])
def test_a_shape_with_other_bits_is_left_out(other: Digests) -> None:
    found = dict.fromkeys(disputed(BUCKETS), SAME) | {Bucket(8, 2): other}
    assert agreeing(BUCKETS, found) == tuple(b for b in BUCKETS if b != Bucket(8, 2))


def test_the_largest_shape_decides() -> None:
    found = dict.fromkeys(disputed(BUCKETS), SAME) | {Bucket(32, 4): frozenset([b"other"])}
    assert agreeing(BUCKETS, found) == tuple(b for b in BUCKETS if b != Bucket(32, 2))


def test_a_model_whose_rows_depend_on_their_place_is_refused() -> None:
    found = dict.fromkeys(disputed(BUCKETS), SAME) | {Bucket(8, 4): frozenset([b"one", b"other"])}
    with pytest.raises(ModelError, match="4 rows of 8 tokens") as caught:
        agreeing(BUCKETS, found)
    assert caught.value.reason is Reason.CHECKPOINT_UNSUPPORTED


def test_a_probe_has_one_row_in_all_company() -> None:
    batches = {bucket: probe(bucket, 100) for bucket in BUCKETS}
    for bucket, batch in batches.items():
        assert batch.bucket == bucket
        assert batch.tokens.min() >= 0
        assert batch.tokens.max() < 100
        row = batches[
            Bucket(bucket.length, min(b.rows for b in BUCKETS if b.length == bucket.length))
        ]
        for place in (0, -1):
            np.testing.assert_array_equal(batch.tokens[place], row.tokens[0])
            assert batch.segments[place].all()
        for middle in range(1, bucket.rows - 1):
            assert (batch.tokens[middle] != batch.tokens[0]).any()
    assert not batches[Bucket(32, 4)].segments.all()  # some rows are padded


def test_an_engine_tells_shapes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the compiler had taken another order for one row: its program runs other weights."""
    buckets = (Bucket(32, 1), Bucket(32, 2), Bucket(64, 1))
    engine = LocalEngine(mesh_of(1, 1), buckets, profiles=[Profile(("logprobs",))])
    engine.load("model", open_folder(GOLDEN / "llama3", "float32"), LoadMonitor())
    assert proven(buckets, lambda bucket: engine.probe("model", bucket)) == buckets
    programs = engine._models["model"].programs
    stored = programs.trunks[buckets[0]]

    def other(params, *batch):
        return stored(params | {"final_norm": params["final_norm"] * (1 + 1e-6)}, *batch)

    monkeypatch.setitem(programs.trunks, buckets[0], other)
    assert proven(buckets, lambda bucket: engine.probe("model", bucket)) == buckets[1:]


@scenario
async def test_a_model_runs_in_what_was_proven_and_the_log_says_so(cache, engine):
    said = []
    one_row = BUCKETS_OF_DOUBLE[0]
    with (
        mock.patch("moorage_server.loader._log.info", lambda text, *words: said.append(words)),
        mock.patch.object(engine, "probe", lambda _, bucket: frozenset([bytes(bucket == one_row)])),
    ):
        model = await load(cache)
    assert model.buckets == (Bucket(128, 4),)  # its context is 128
    assert said == [(model.handle, "1x128")]
    message = to_model(cache.snapshot(model), 0.0)
    assert [(bucket.rows, bucket.length) for bucket in message.buckets] == [(4, 128)]
    assert await forward(cache, engine, model)


@scenario
async def test_a_proof_that_fails_leaves_nothing(cache, engine):
    engine.failures["probe"] = RuntimeError("no memory left")
    with pytest.raises(RuntimeError):
        await load(cache)
    assert (engine.loaded, cache.models(), cache.budget.reserved()) == (set(), [], 0)
    assert (await load(cache)).buckets


@scenario
async def test_a_proof_is_cancelled_after_the_shape_that_runs(cache, engine):
    engine.hold("probe")
    loading = asyncio.create_task(load(cache))
    await reached(engine, "probe")
    unloading = asyncio.create_task(cache.unload(cache.models()[0].handle))
    await asyncio.sleep(0)
    engine.release("probe")
    with pytest.raises(ModelError) as caught:
        await loading
    assert caught.value.reason is Reason.LOAD_CANCELLED
    assert await unloading == {}
    assert engine.count("probe") == 1
    assert (engine.loaded, cache.models(), cache.budget.reserved()) == (set(), [], 0)
