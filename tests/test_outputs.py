"""Every output against float64 arithmetic on transformers' logits, for every golden checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from checkpoints import GOLDEN, VARIANTS, golden_config, mesh_of, open_folder, stored_tensors
from moorage_models.config import ModelConfig
from moorage_models.monitor import LoadMonitor
from moorage_server.engine import Bucket
from moorage_server.engine.local import LocalEngine
from moorage_server.engine.outputs import PROFILES, Profile, served
from moorage_server.requests import Wanted
from moorage_server.rows import Rows, make_rows
from moorage_server.scoring import make_work, score

Sizes = tuple[int, int]  # fsdp, tp

CASES = ("plain", "right_pad", "left_pad", "long", "packed")
PLAIN = slice(0, 40)  # the tokens of the first case: two rows of twenty
TEMPERATURES = (0.5, 1.0, 2.0)

#: Caps, windows and a tied head; odd sizes; experts; a reward model.
QUICK: list[Any] = [(name, (2, 2)) for name in ("gemma2", "llama3_oddvocab", "qwen3_moe")]
SLOW = [
    pytest.param(name, sizes, marks=pytest.mark.soak)
    for name in VARIANTS
    for sizes in ((1, 1), (2, 2))
]
FEW = (
    Profile(("logprobs", "entropy")),
    Profile(("logprobs", "entropy", "top_k"), 128),
    Profile(("logprobs", "entropy", "candidates"), 8),
    Profile(("logits",)),
    Profile(("score",)),
    Profile(("hidden",)),
)


@dataclass(frozen=True)
class Reference:
    """What transformers says of the real tokens of all cases, one row after another.

    `logits` are a reward model's scores; `noise` is their own error.
    """

    rows: Rows
    logits: np.ndarray
    noise: np.ndarray
    hidden: np.ndarray
    hidden_noise: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Tokens with another before them in their segment."""
        return np.flatnonzero(~self.rows.begins)

    @property
    def tolerance(self) -> np.ndarray:
        """As far as logits after a token may be off."""
        wanted: np.ndarray = 3 * self.noise + 2e-5
        return wanted

    def logprobs(self, temperature: float) -> np.ndarray:
        """Of every token of the vocabulary, before each known token."""
        x = self.logits[self.known - 1].astype(np.float64) / temperature
        x -= x.max(axis=-1, keepdims=True)
        probabilities: np.ndarray = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
        return probabilities


@cache
def reference(name: str) -> Reference:
    with np.load(GOLDEN / name / "golden.npz") as file:
        stored = dict(file)
    logits = "logits" if "plain/logits" in stored else "scores"
    real = {case: stored[f"{case}/segments"] > 0 for case in CASES}

    def all_of(key: str) -> np.ndarray:
        return np.concatenate([stored[f"{case}/{key}"][real[case]] for case in CASES])

    rows = make_rows(
        all_of("tokens").tolist(),
        np.concatenate([real[case].sum(axis=1) for case in CASES]).tolist(),
        all_of("segments").tolist(),
    )
    noise = np.concatenate([np.full(real[c].sum(), stored[f"{c}/noise"]) for c in CASES])
    hidden = stored["plain/hidden"]
    hidden = hidden.reshape(len(hidden), -1, hidden.shape[-1])
    return Reference(rows, all_of(logits), noise, hidden, stored["plain/hidden_noise"])


@dataclass(frozen=True)
class Served:
    engine: LocalEngine
    config: ModelConfig
    profiles: tuple[Profile, ...]

    def run(self, rows: Rows, *outputs: str, **wanted: Any) -> dict[str, np.ndarray]:
        buckets = self.engine.info().buckets
        work = make_work(rows, Wanted(outputs, **wanted), self.config, buckets, self.profiles)
        devices = self.engine.info().mesh["fsdp"]
        score(work, buckets, devices, lambda *asked: self.engine.forward("model", *asked))
        work.check()
        return work.tensors


def serve(name: str, sizes: Sizes, profiles: tuple[Profile, ...]) -> Served:
    checkpoint = open_folder(GOLDEN / name, "float32", "float32")
    engine = LocalEngine(mesh_of(*sizes), [Bucket(128, 4 * sizes[0])], profiles=profiles)
    engine.load("model", checkpoint, LoadMonitor())
    return Served(engine, checkpoint.config, served(checkpoint.config, profiles))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "sizes"), QUICK, ids=str)
def test_a_few_programs(name: str, sizes: Sizes) -> None:
    check(serve(name, sizes, FEW), name)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "sizes"), SLOW, ids=str)
def test_every_program(name: str, sizes: Sizes) -> None:
    check(serve(name, sizes, PROFILES), name)


@pytest.mark.parametrize("name", ["gemma2_reward", "qwen3_reward"])
def test_scores(name: str) -> None:
    check(serve(name, (1, 1), FEW), name)


def check(model: Served, name: str) -> None:
    wanted = reference(name)
    if model.config.num_labels:
        check_scores(model, wanted)
    else:
        for temperature in TEMPERATURES:
            check_probabilities(model, wanted, temperature)
        check_logits(model, wanted)
        check_from_positions(model, wanted)
        check_first_tokens(model, wanted)
    check_hidden(model, wanted, name)
    assert model.engine.compiles_after_ready() == 0


def check_probabilities(model: Served, wanted: Reference, temperature: float) -> None:
    known, all_logprobs = wanted.known, wanted.logprobs(temperature)
    tolerance = wanted.tolerance[known] * max(1.0, 1 / temperature)
    rows, vocabulary = wanted.rows, all_logprobs.shape[-1]

    def run(*outputs: str, **more: Any) -> dict[str, np.ndarray]:
        return model.run(rows, *outputs, temperature=temperature, **more)

    found = run("logprobs", "entropy")
    chosen = np.take_along_axis(all_logprobs, rows.tokens[known, None], axis=-1)[:, 0]
    assert (np.abs(found["logprobs"][known] - chosen) <= tolerance).all()
    probabilities = np.exp(all_logprobs)
    entropy = -(probabilities * all_logprobs).sum(axis=-1)
    # An error of the logits changes an entropy by as much as the log-probabilities differ from it.
    spread = (probabilities * np.abs(all_logprobs + entropy[:, None])).sum(axis=-1)
    error = np.abs(found["entropy"][known] - entropy)
    assert (error <= tolerance * np.maximum(1, spread)).all()

    ordered = np.sort(all_logprobs, axis=-1)[:, ::-1]
    for count in (5, 20, 100):
        found = run("top_k", "logprobs", top_k=count)
        assert (np.abs(found["logprobs"][known] - chosen) <= tolerance).all()
        values, ids = found["top_k_logprobs"][known], found["top_k_ids"][known]
        assert values.shape == ids.shape == (len(known), count)
        assert (np.abs(values - ordered[:, :count]) <= tolerance[:, None]).all()
        assert (np.diff(values) <= 0).all()
        gaps = -np.diff(ordered[:, : count + 1]) > 2 * tolerance[:, None]
        alone = gaps & np.pad(gaps[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        assert alone.mean() > 0.5
        assert (ids == np.argsort(-all_logprobs, kind="stable")[:, :count])[alone].all()

    generator = np.random.default_rng(3)
    one = generator.integers(0, vocabulary, 7, np.int32)
    each = generator.integers(0, vocabulary, (len(rows.tokens), 3), np.int32)
    for sets, ids in ((one, np.broadcast_to(one, (len(known), 7))), (each, each[known])):
        found = run("candidates", candidates=sets.reshape(-1), candidate_count=ids.shape[1])
        error = np.abs(found["candidates"][known] - np.take_along_axis(all_logprobs, ids, axis=-1))
        assert error.shape == ids.shape
        assert (error <= tolerance[:, None]).all()


def check_logits(model: Served, wanted: Reference) -> None:
    raw = model.run(wanted.rows, "logits", temperature=2.0)["logits"]
    error = np.abs(raw - wanted.logits)
    assert error.shape == wanted.logits.shape
    assert (error.max(axis=-1) <= wanted.tolerance).all()
    for temperature in TEMPERATURES:
        scaled = model.run(wanted.rows, "logits", temperature=temperature, scales_logits=True)
        error = np.abs(scaled["logits"] - wanted.logits.astype(np.float64) / temperature)
        assert (error.max(axis=-1) <= wanted.tolerance * max(1.0, 1 / temperature)).all()
    positions = np.arange(1, len(wanted.rows.tokens), 3, dtype=np.int32)
    some = model.run(wanted.rows, "logits", positions=positions)["logits"]
    np.testing.assert_array_equal(some, raw[positions])


def check_from_positions(model: Served, wanted: Reference) -> None:
    """Asked for from a position on, the values are the same bits."""
    rows = wanted.rows
    firsts = (np.arange(len(rows.lengths)) * 5 % 17).tolist()
    kept = rows.at >= np.array(firsts)[rows.row]
    sets = {"top_k": 5, "temperature": 2.0}
    whole = model.run(rows, "logprobs", "entropy", "top_k", **sets)
    part = model.run(rows, "logprobs", "entropy", "top_k", from_positions=firsts, **sets)
    for name, values in whole.items():
        np.testing.assert_array_equal(part[name], values[kept])


def check_first_tokens(model: Served, wanted: Reference) -> None:
    first = wanted.rows.begins
    assert first.sum() == 17
    for value in (np.nan, 0.0):
        found = model.run(wanted.rows, "logprobs", "entropy", "top_k", top_k=5, first_value=value)
        for name in ("logprobs", "entropy", "top_k_logprobs"):
            np.testing.assert_array_equal(
                found[name][first], np.full_like(found[name][first], value)
            )
            assert np.isfinite(found[name][~first]).all()
        assert (found["top_k_ids"][first] == -1).all()
        assert (found["top_k_ids"][~first] >= 0).all()


def check_scores(model: Served, wanted: Reference) -> None:
    positions = np.arange(len(wanted.rows.tokens), dtype=np.int32)
    everywhere = model.run(wanted.rows, "score", positions=positions)["score"]
    error = np.abs(everywhere - wanted.logits)
    assert error.shape == wanted.logits.shape
    assert (error.max(axis=-1) <= wanted.tolerance).all()
    last = np.flatnonzero(np.append(wanted.rows.begins[1:], True))
    for temperature in TEMPERATURES:  # of a softmax, which a score has none of
        found = model.run(wanted.rows, "score", temperature=temperature)["score"]
        np.testing.assert_array_equal(found, everywhere[last])


def check_hidden(model: Served, wanted: Reference, name: str) -> None:
    rows = make_rows(wanted.rows.tokens[PLAIN].tolist(), [20, 20], [])
    layers = model.config.num_layers
    middle = model.run(rows, "hidden", layer=(layers + 1) // 2)["hidden"]
    final = model.run(rows, "hidden")["hidden"]
    for found, hidden, noise in zip(
        (middle, final), wanted.hidden, wanted.hidden_noise, strict=True
    ):
        assert found.shape == hidden.shape
        assert np.abs(found - hidden).max() <= 3 * noise + 2e-5
    np.testing.assert_array_equal(model.run(rows, "hidden", layer=layers)["hidden"], final)

    tensors = stored_tensors(GOLDEN / name)
    table = next(x for key, x in tensors.items() if key.endswith("embed_tokens.weight"))
    scale = table.shape[-1] ** 0.5 if "gemma" in str(golden_config(name)["model_type"]) else 1.0
    embedded = table.astype(np.float64)[rows.tokens] * scale
    first = model.run(rows, "hidden", layer=0)["hidden"]
    np.testing.assert_allclose(first, embedded, rtol=1e-6)

    positions = np.array([0, 7, 19, 20, 33], np.int32)
    some = model.run(rows, "hidden", layer=(layers + 1) // 2, positions=positions)["hidden"]
    np.testing.assert_array_equal(some, middle[positions])
