"""Nothing is compiled for a forward pass, whatever is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import GOLDEN, mesh_of, open_folder
from moorage_models.config import ModelConfig
from moorage_models.monitor import LoadMonitor
from moorage_server.engine import Bucket, programs
from moorage_server.engine.compiles import CompileCounter
from moorage_server.engine.local import LocalEngine
from moorage_server.engine.outputs import PROFILES, served
from moorage_server.requests import Wanted
from moorage_server.rows import Rows, make_rows
from moorage_server.scoring import make_work, score

NAME = "gemma1_mqa"
BUCKETS = (Bucket(64, 2), Bucket(64, 4), Bucket(128, 2))


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    made = LocalEngine(mesh_of(2, 1), BUCKETS, profiles=PROFILES)
    made.load("model", open_folder(GOLDEN / NAME), LoadMonitor())
    return made


def wanteds(config: ModelConfig, tokens: int, rng: np.random.Generator) -> list[Wanted]:
    """One request of every kind, with sizes by chance."""
    vocabulary, count = config.vocab_size, int(rng.integers(1, 65))
    ids = rng.integers(0, vocabulary, count, np.int32)
    positions = np.flatnonzero(rng.random(tokens) < 0.5).astype(np.int32)
    temperature = float(rng.uniform(0.1, 3.0))
    return [
        Wanted(("logprobs",), temperature=temperature),
        Wanted(("entropy",), from_positions=(int(rng.integers(0, 9)),)),
        Wanted(("top_k", "logprobs"), top_k=int(rng.integers(1, 129)), temperature=temperature),
        Wanted(("candidates",), candidates=ids, candidate_count=count),
        Wanted(("logits",), positions=positions, temperature=temperature, scales_logits=True),
        Wanted(("hidden",), layer=int(rng.integers(0, config.num_layers + 1)), positions=positions),
        Wanted(("hidden", "logprobs", "top_k"), top_k=3),
    ]


def some_rows(vocabulary: int, rng: np.random.Generator) -> Rows:
    lengths = rng.integers(1, 129, rng.integers(1, 6)).tolist()
    return make_rows(rng.integers(0, vocabulary, sum(lengths)).tolist(), lengths, [])


def run(engine: LocalEngine, config: ModelConfig, rows: Rows, wanted: Wanted) -> None:
    work = make_work(rows, wanted, config, BUCKETS, served(config))
    score(work, BUCKETS, 2, lambda *asked: engine.forward("model", *asked))
    work.check()


def requests(config: ModelConfig, seed: int) -> Iterator[tuple[Rows, Wanted]]:
    """Requests without an end, of every kind in turn."""
    rng = np.random.default_rng(seed)
    while True:
        rows = some_rows(config.vocab_size, rng)
        yield from ((rows, wanted) for wanted in wanteds(config, len(rows.tokens), rng))


def check(engine: LocalEngine, count: int) -> None:
    config = open_folder(GOLDEN / NAME).config
    for _, (rows, wanted) in zip(range(count), requests(config, count), strict=False):
        run(engine, config, rows, wanted)
    assert engine.compiles_after_ready() == 0


def test_no_request_compiles(engine: LocalEngine) -> None:
    check(engine, 42)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_none_of_ten_thousand_requests_compiles(engine: LocalEngine) -> None:
    begin = time.perf_counter()
    check(engine, 10_000)
    print(f"\n{10_000 / (time.perf_counter() - begin):.0f} requests a second")


def test_what_compiles_in_a_forward_pass_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a program had been left out, and jax had made it up for the call."""
    config = open_folder(GOLDEN / NAME).config
    engine = LocalEngine(mesh_of(1, 1), BUCKETS, profiles=PROFILES[:1])
    engine.load("model", open_folder(GOLDEN / NAME), LoadMonitor())
    compiled = engine._models["model"].programs
    bucket = BUCKETS[0]
    stored = compiled.gathers[bucket]
    sizes = iter(range(3, 6))

    def compiling(*arguments: jax.Array) -> jax.Array:
        jax.jit(lambda x: jnp.sum(x) + 1)(np.zeros(next(sizes), np.float32))
        found: jax.Array = stored(*arguments)
        return found

    rows = make_rows([5, 6, 7], [3], [])
    work = make_work(rows, Wanted(("logprobs",)), config, BUCKETS, PROFILES[:1])
    monkeypatch.setitem(compiled.gathers, bucket, compiling)
    assert engine.compiles_after_ready() == 0
    for count in (1, 2, 3):
        score(work, BUCKETS, 1, lambda *asked: engine.forward("model", *asked))
        assert engine.compiles_after_ready() == count


def test_the_rest_is_not_compiled_once_a_program_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, mesh, tried = open_folder(GOLDEN / NAME), mesh_of(1, 1), []
    lowered, program = Event(), jax.jit(lambda x: x).lower(0.0)

    def lower_head(*arguments: Any) -> jax.stages.Lowered:
        if arguments[-1] is PROFILES[-1]:
            lowered.set()
        return program

    def fail(*arguments: Any, is_trunk: bool) -> None:
        tried.append(is_trunk)
        assert lowered.wait(20)
        time.sleep(0.2)
        raise RuntimeError("a bug")

    for part in ("lower_trunk", "lower_gather"):
        monkeypatch.setattr(programs, part, lambda *_: program)
    monkeypatch.setattr(programs, "lower_head", lower_head)
    monkeypatch.setattr(programs, "compile_lowered", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        programs.compile_programs(
            checkpoint.plan, "float32", mesh, BUCKETS, PROFILES, LoadMonitor()
        )
    assert 1 <= len(tried) <= 4 < len(PROFILES)


def test_what_compiles_elsewhere_is_not() -> None:
    counter = CompileCounter()
    with counter.counting():
        pass
    jax.jit(lambda x: x * 3 + 1)(np.zeros(11, np.float32))
    assert counter.count == 0
    with counter.counting():
        jax.jit(lambda x: x * 3 + 2)(np.zeros(11, np.float32))
    assert counter.count == 1
