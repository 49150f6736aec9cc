"""The same row, the same bits: whatever its neighbours, their order, the batch and the devices.

Through the engine, whose programs are compiled with the options that the promise needs. A bucket's
rows are counted for each data-parallel device, so another number of devices means the same shape on
each. Between buckets of one length the engine says which agree: for tiny models the CPU's compiler
takes other kernels by size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import real_models
from checkpoints import GOLDEN, VARIANTS, make_wide, mesh_of, open_folder
from moorage_models.attention import KEY_RUN
from moorage_models.checkpoint import Checkpoint
from moorage_models.config import ModelConfig
from moorage_models.monitor import LoadMonitor
from moorage_server.engine import Bucket
from moorage_server.engine.agreement import proven
from moorage_server.engine.local import LocalEngine
from moorage_server.engine.outputs import PROFILES, Profile, served
from moorage_server.requests import Wanted
from moorage_server.rows import Rows, make_rows
from moorage_server.scoring import Piece, Work, bucket_for, length_for, make_work, run_batch, score

SIZES = (1, 2, 4, 8)
FIRST = (Profile(("logprobs",)), Profile(("score",)))
QUICK = [("qwen3_moe", "float32", (1, 4)), ("gemma3_text_mqa", "bfloat16", (1, 4))]
SLOW = [
    pytest.param(name, dtype, SIZES, marks=pytest.mark.soak)
    for name in VARIANTS
    for dtype in ("float32", "bfloat16")
]


def serve(
    checkpoint: Checkpoint,
    fsdp: int,
    buckets: list[Bucket],
    profiles: Sequence[Profile] = FIRST,
    tp: int = 1,
) -> LocalEngine:
    engine = LocalEngine(mesh_of(fsdp, tp), buckets, profiles=profiles)
    engine.load("model", checkpoint, LoadMonitor())
    return engine


def rows_of(vocabulary: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, vocabulary - 12, length).tolist() for length in lengths]


def scores(
    engine: LocalEngine, config: Any, rows: list[list[int]], buckets: list[Bucket]
) -> list[np.ndarray]:
    """The bits of the first output at every token of every row, in the order of `rows`."""
    profiles = served(config, FIRST)
    ((output,),) = [profile.outputs for profile in profiles]
    lengths = [len(row) for row in rows]
    packed = make_rows(np.concatenate(rows).tolist(), lengths, [])
    positions = np.arange(sum(lengths) if output == "score" else 0, dtype=np.int32)
    wanted = Wanted((output,), positions=positions)
    work = make_work(packed, wanted, config, buckets, profiles)
    devices = engine.info().mesh["fsdp"]
    score(work, buckets, devices, lambda *asked: engine.forward("model", *asked))
    found = work.tensors[output]
    assert len(found) == sum(lengths)
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
        engine = serve(checkpoint, size, buckets)
        together = scores(engine, checkpoint.config, rows, buckets)
        wanted = wanted or together
        assert same(together, wanted), size
        assert same(scores(engine, checkpoint.config, rows[::-1], buckets)[::-1], wanted), size
        alone = [scores(engine, checkpoint.config, [row], buckets)[0] for row in rows[:3]]
        assert same(alone, wanted[:3]), size


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "name", ["llama3", *(pytest.param(name, marks=pytest.mark.soak) for name in VARIANTS)]
)
def test_whatever_the_bucket_of_those_that_were_proven(name: str, dtype: str) -> None:
    checkpoint = open_folder(GOLDEN / name, dtype, dtype)
    rows = rows_of(checkpoint.config.vocab_size, (5, 72, 128, 17, 40, 64, 99, 3))
    shapes = [Bucket(128, count) for count in (1, 2, 4, 8)]
    engine = serve(checkpoint, 1, shapes)
    buckets = proven(shapes, dtype, 1, lambda probe: engine.probe("model", probe))
    assert buckets[-1] == shapes[-1]
    assert buckets == tuple(shapes) or name != "llama3"
    found = [scores(engine, checkpoint.config, rows, [bucket]) for bucket in buckets]
    assert all(same(one, found[-1]) for one in found)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whatever_the_bucket_of_a_real_model(dtype: str) -> None:
    checkpoint = open_folder(real_models.make("smollm2-135m-instruct"), dtype, dtype)
    rows = rows_of(checkpoint.config.vocab_size, (5, 100, 128, 60) * 8)
    wanted: list[np.ndarray] | None = None
    for size in (1, 2):
        shapes = [Bucket(128, size), Bucket(128, 4 * size), Bucket(128, 8 * size)]
        engine = serve(checkpoint, size, shapes)
        agreed = proven(shapes, dtype, size, lambda probe: engine.probe("model", probe))  # noqa: B023
        for bucket in agreed:
            found = scores(engine, checkpoint.config, rows, [bucket])
            wanted = wanted or found
            assert same(found, wanted), (size, bucket)


# Segments that a caller packs.

#: Lengths of each row's segments, in runs of keys.
PACKED = [(4, 5, 1), (1, 7, 6), (14, 5), (1, 20)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama3", "float32"),
        pytest.param("llama3", "bfloat16", marks=pytest.mark.soak),
        pytest.param("qwen3_untied", "float32", marks=pytest.mark.soak),
        pytest.param("qwen3_untied", "bfloat16", marks=pytest.mark.soak),
    ],
)
def test_whatever_a_segment_is_packed_with(tmp_path: Path, name: str, dtype: str) -> None:
    """A segment at a multiple of 64, wherever the compiler cuts the keys of a row, and alone."""
    checkpoint = open_folder(make_wide(tmp_path / "wide", name), "float32", dtype)
    buckets = [Bucket(length, 1) for length in (128, 256, 512, 2048)]
    profiles = (Profile(("logprobs",)), Profile(("hidden",)))
    engine = serve(checkpoint, 1, buckets, profiles)
    rng = np.random.default_rng(3)

    def ask(segments: list[np.ndarray]) -> dict[str, np.ndarray]:
        tokens = np.concatenate(segments)
        numbers = np.repeat(np.arange(len(segments)) + 1, [len(one) for one in segments])
        rows = make_rows(tokens.tolist(), [len(tokens)], numbers.tolist())
        work = make_work(rows, Wanted(("logprobs", "hidden")), checkpoint.config, buckets, profiles)
        score(work, buckets, 1, lambda *asked: engine.forward("model", *asked))
        return work.tensors

    for runs in PACKED:
        lengths = [run * KEY_RUN for run in runs]
        segments = [rng.integers(0, 3000, length) for length in lengths]
        together, starts = ask(segments), np.cumsum([0, *lengths])
        for start, segment in zip(starts, segments, strict=False):
            for output, alone in ask([segment]).items():
                found = together[output][start : start + len(segment)]
                assert alone.tobytes() == found.tobytes(), (output, start, len(segment))


# Every output, with companions from other requests.


def some_request(
    config: ModelConfig, longest: int, rng: np.random.Generator
) -> tuple[Rows, Wanted]:
    """Rows, segments and outputs by chance."""
    lengths = rng.integers(1, longest + 1, rng.integers(1, 4)).tolist()
    cuts = [int(rng.integers(1, length + 1)) for length in lengths]
    segments = [1 + int(at >= cut) for n, cut in zip(lengths, cuts, strict=True) for at in range(n)]
    tokens = rng.integers(0, config.vocab_size, sum(lengths)).tolist()
    ids = rng.integers(0, config.vocab_size, int(rng.integers(1, 65)), np.int32)
    some = np.flatnonzero(rng.random(sum(lengths)) < 0.1).astype(np.int32)
    temperature = float(rng.choice([0.5, 1.0, 1.7]))
    kinds = [
        Wanted(("logprobs", "entropy"), temperature=temperature),
        Wanted(("top_k", "entropy"), top_k=int(rng.integers(1, 129)), temperature=temperature),
        Wanted(("candidates",), candidates=ids, candidate_count=len(ids)),
        Wanted(("hidden",), layer=int(rng.integers(0, config.num_layers + 1)), positions=some),
        Wanted(("hidden", "logprobs"), from_positions=(int(rng.integers(0, 20)),)),
        Wanted(("logits",), positions=some, temperature=temperature, scales_logits=True),
    ]
    return make_rows(tokens, lengths, segments), kinds[rng.integers(len(kinds))]


def merged(
    works: list[Work], engine: LocalEngine, buckets: list[Bucket], rng: np.random.Generator
) -> None:
    """Runs the rows of all requests in any order and company, in any bucket that holds them."""
    devices = engine.info().mesh["fsdp"]
    pieces = [Piece(work, row) for work in works for row in work.runnable()]
    pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    for layer in {piece.work.wanted.layer for piece in pieces}:
        own = [piece for piece in pieces if piece.work.wanted.layer == layer]
        while own:
            count = min(len(own), int(rng.integers(1, 1 + max(b.rows for b in buckets))))
            longest = length_for(max(piece.length for piece in own[:count]), buckets)
            bucket = bucket_for(count, longest, buckets)
            now, own = own[: min(count, bucket.rows)], own[min(count, bucket.rows) :]
            run_batch(now, bucket, devices, lambda *asked: engine.forward("model", *asked))


def check_requests(
    checkpoint: Checkpoint,
    count: int,
    profiles: Sequence[Profile],
    meshes: Sequence[tuple[int, int]],
    per_device: Sequence[Bucket],
) -> None:
    """Each request by itself on the first mesh, against all of them mixed on every one."""
    rng = np.random.default_rng(5)
    config = checkpoint.config
    asked = [some_request(config, per_device[-1].length, rng) for _ in range(count)]
    expected: list[dict[str, np.ndarray]] = []
    for fsdp, tp in meshes:
        buckets = [Bucket(b.length, b.rows * fsdp) for b in per_device]
        engine = serve(checkpoint, fsdp, buckets, profiles, tp)

        def works() -> list[Work]:
            return [make_work(*one, config, per_device, profiles) for one in asked]

        if not expected:
            for work in works():
                score(work, buckets, fsdp, lambda *asked: engine.forward("model", *asked))  # noqa: B023
                expected.append(work.tensors)
        mixed = works()
        merged(mixed, engine, buckets, rng)
        for wanted, found in zip(expected, (work.tensors for work in mixed), strict=True):
            for name, values in wanted.items():
                assert values.tobytes() == found[name].tobytes(), (fsdp, tp, name)


def test_whatever_the_companions(tmp_path: Path) -> None:
    checkpoint = open_folder(make_wide(tmp_path / "wide", "qwen3_untied"), "float32", "float32")
    profiles = (
        Profile(("logprobs", "entropy", "top_k"), 128),
        Profile(
            ("logprobs", "entropy"),
        ),
        Profile(("logprobs", "entropy", "candidates"), 64),
        Profile(("logprobs",)),
        Profile(("logits",)),
        Profile(("hidden",)),
    )
    check_requests(checkpoint, 12, profiles, [(1, 1)], [Bucket(128, 1), Bucket(128, 4)])


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "tp"), [("llama3", 1), ("llama3", 2), ("qwen3_untied", 1)])
def test_five_hundred_requests(tmp_path: Path, name: str, tp: int, dtype: str) -> None:
    checkpoint = open_folder(make_wide(tmp_path / "wide", name), dtype, dtype)
    profiles = [profile for profile in PROFILES if profile in served(checkpoint.config)]
    meshes = [(size, tp) for size in SIZES if size * tp <= 8]
    buckets = [Bucket(64, 1), Bucket(64, 4), Bucket(128, 2)]
    check_requests(checkpoint, 500, profiles, meshes, buckets)
