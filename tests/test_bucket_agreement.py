"""Shapes in which a row gets other bits are found before a model is served, and not used."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest

from cache_scenario import forward, load, reached, scenario
from checkpoints import GOLDEN, mesh_of, open_folder
from engine_double import BUCKETS as BUCKETS_OF_DOUBLE
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_server.convert import to_model
from moorage_server.engine import Bucket, Probe
from moorage_server.engine.agreement import (
    HALF_PRECISION_TOKENS,
    agreeing,
    batch_of,
    probes,
    proven,
)
from moorage_server.engine.local import LocalEngine
from moorage_server.engine.outputs import Profile

BUCKETS = [Bucket(8, 1), Bucket(8, 2), Bucket(8, 4), Bucket(16, 1), Bucket(32, 2), Bucket(32, 4)]


def found(
    buckets: list[Bucket], other: dict[Bucket, set[int]] | None = None, dtype: str = "float32"
) -> dict[Probe, list[bytes]]:
    """What probes give if some rows have other bits in some buckets."""
    other = other or {}
    return {
        probe: [b"%d %d" % (row, row in other.get(probe.bucket, ())) for row in probe.rows]
        for probe in probes(buckets, dtype, 1)
    }


def test_one_row_runs_in_every_shape_of_a_length() -> None:
    tried = probes(BUCKETS, "float32", 1)
    rows = {bucket: [p.rows for p in tried if p.bucket == bucket] for bucket in BUCKETS}
    assert rows[Bucket(8, 1)] == [(0,)]
    assert rows[Bucket(8, 2)] == [(0, 0)]
    assert rows[Bucket(8, 4)] == [(0, 1, 2, 0)]  # at two places
    assert rows[Bucket(16, 1)] == []  # there is one way to run a row of this length
    assert rows[Bucket(32, 2)] == [(0, 0)]


def test_one_shape_is_tried_if_a_device_has_several_rows() -> None:
    assert [probe.rows for probe in probes([Bucket(8, 4)], "float32", 2)] == [(0, 1, 2, 0)]
    assert probes([Bucket(8, 4)], "float32", 4) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_many_rows_are_tried(dtype: str) -> None:
    for buckets in ([Bucket(128, 1), Bucket(128, 8)], [Bucket(512, 8)], [Bucket(128, 96)]):
        tried = probes(buckets, dtype, 1)
        for bucket in buckets:
            rows = {row for probe in tried if probe.bucket == bucket for row in probe.rows}
            assert rows == set(range(len(rows)))
            assert len(rows) * bucket.length >= HALF_PRECISION_TOKENS


def test_shapes_that_agree_are_all_used() -> None:
    assert agreeing(BUCKETS[::-1], found(BUCKETS)) == tuple(BUCKETS)


def test_a_shape_with_other_bits_is_left_out() -> None:
    """If that is so of one row."""
    wrong = {Bucket(8, 2): {0}}
    assert agreeing(BUCKETS, found(BUCKETS, wrong)) == tuple(b for b in BUCKETS if b not in wrong)
    wrong = {Bucket(8, 1): {901}}
    given = found(BUCKETS, wrong, "bfloat16")
    assert agreeing(BUCKETS, given) == tuple(b for b in BUCKETS if b not in wrong)


def test_the_largest_shape_decides() -> None:
    wrong = {Bucket(32, 4): {0}}
    assert agreeing(BUCKETS, found(BUCKETS, wrong)) == (*BUCKETS[:4], Bucket(32, 4))


def test_a_model_whose_rows_depend_on_their_place_is_refused() -> None:
    given = found(BUCKETS)
    given[Probe(Bucket(8, 4), (0, 1, 2, 0))][3] = b"other"
    with pytest.raises(ModelError, match="4 rows of 8 tokens") as caught:
        agreeing(BUCKETS, given)
    assert caught.value.reason is Reason.CHECKPOINT_UNSUPPORTED


def test_a_row_is_the_same_in_every_batch() -> None:
    seen: dict[tuple[int, int], bytes] = {}
    for probe in probes(BUCKETS, "bfloat16", 1):
        batch = batch_of(probe, 100)
        assert batch.bucket == probe.bucket
        assert batch.tokens.min() >= 0
        assert batch.tokens.max() < 100
        for place, row in enumerate(probe.rows):
            given = batch.tokens[place].tobytes() + batch.segments[place].tobytes()
            assert seen.setdefault((probe.bucket.length, row), given) == given
    assert len(set(seen.values())) == len(seen)


def test_some_rows_are_padded() -> None:
    ends = batch_of(Probe(Bucket(32, 4), (0, 1, 2, 3)), 100).segments.sum(1)
    assert (ends[[0, 2]] == 32).all()
    assert ((ends[[1, 3]] >= 16) & (ends[[1, 3]] < 32)).all()


def tried(engine: LocalEngine, buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    devices = engine.info().mesh["fsdp"]
    return proven(buckets, "float32", devices, lambda probe: engine.probe("model", probe))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_an_engine_tells_shapes_apart(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """As if the compiler had taken another order for one row: its program runs other weights."""
    rows = shape[0]
    buckets = (Bucket(32, rows), Bucket(32, 2 * rows), Bucket(64, rows))
    engine = LocalEngine(mesh_of(*shape), buckets, profiles=[Profile(("logprobs",))])
    engine.load("model", open_folder(GOLDEN / "llama3", "float32"), LoadMonitor())
    assert tried(engine, buckets) == buckets
    programs = engine._models["model"].programs
    stored = programs.trunks[buckets[0]]

    def other(params, *batch):
        return stored(params | {"final_norm": params["final_norm"] * (1 + 1e-6)}, *batch)

    monkeypatch.setitem(programs.trunks, buckets[0], other)
    assert tried(engine, buckets) == buckets[1:]


@scenario
async def test_a_model_runs_in_what_was_proven_and_the_log_says_so(cache, engine):
    said = []
    one_row = BUCKETS_OF_DOUBLE[0]
    with (
        mock.patch("moorage_server.loader._log.info", lambda text, *words: said.append(words)),
        mock.patch.object(
            engine, "probe", lambda _, probe: [bytes(probe.bucket == one_row) for _ in probe.rows]
        ),
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
