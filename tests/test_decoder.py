"""The decoder's numbers are transformers': every golden checkpoint, on one device and on four."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import GOLDEN, VARIANTS, golden_config, mesh_of, open_folder
from moorage_models.automodel import load
from moorage_models.config import RopeScaling
from moorage_models.decoder import Decoder, segment_positions
from moorage_models.families import PRESETS
from moorage_models.ops import rotary_frequencies

CASES = ("plain", "right_pad", "left_pad", "long", "packed")
ROTARY = Path(__file__).parent / "data" / "rotary" / "rotary.npz"
LENGTH = 72  # of the longest case
LONG = 8  # its row in the batch: one segment throughout
MESHES = [(1, 1), (2, 2)]
BFLOAT16 = [name for name in VARIANTS if golden_config(name)["dtype"] == "bfloat16"]


class Golden(NamedTuple):
    """All cases of a variant in one batch, padded on the right, with one empty row.

    `logits` are a reward model's scores; `tolerance` and `bf16_error` are those of a row's case.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    logits: np.ndarray
    tolerance: np.ndarray
    bf16_error: np.ndarray

    @property
    def real(self) -> np.ndarray:
        return self.segments > 0


@cache
def golden(name: str) -> Golden:
    stored = np.load(GOLDEN / name / "golden.npz")
    logits = "logits" if "plain/logits" in stored else "scores"

    def rows(key: str) -> np.ndarray:
        cases = [stored[f"{case}/{key}"] for case in CASES]
        wide = [
            np.pad(x, [(0, 0), (0, LENGTH - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) for x in cases
        ]
        return np.concatenate([*wide, np.zeros_like(wide[0][:1])])

    def each_row(key: str) -> np.ndarray:
        cases = [np.full(len(stored[f"{case}/tokens"]), stored[f"{case}/{key}"]) for case in CASES]
        return np.concatenate([*cases, [0.0]])

    tokens, positions, segments = (rows(key) for key in ("tokens", "positions", "segments"))
    tolerance = 3 * each_row("noise") + 2e-5
    return Golden(tokens, positions, segments, rows(logits), tolerance, each_row("bf16_error"))


@cache
def model(name: str, mesh: tuple[int, int], dtype: str) -> Decoder:
    checkpoint = open_folder(GOLDEN / name, dtype if dtype == "float32" else "", dtype)
    params, _ = load(checkpoint, mesh_of(*mesh))
    return Decoder(checkpoint.config, mesh_of(*mesh), params, dtype)


def call(decoder: Decoder, tokens: jax.Array, inputs: dict[str, jax.Array]) -> jax.Array:
    logits, cache = decoder(tokens, **inputs)
    assert cache is None
    return logits


#: The same programs, compiled in half the time.
quick_call = jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


def run(decoder: Decoder, tokens: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
    """float32 on one device runs as users run it."""
    as_users_do = decoder.mesh.size == 1 and decoder.compute_dtype == "float32"
    how = call if as_users_do else quick_call
    given = {name: jnp.asarray(array) for name, array in inputs.items()}
    return np.asarray(how(decoder, jnp.asarray(tokens), given))


@cache
def answer(name: str, mesh: tuple[int, int], dtype: str = "float32") -> np.ndarray:
    given = golden(name)
    decoder = model(name, mesh, dtype)
    return run(decoder, given.tokens, positions=given.positions, segment_ids=given.segments)


def misses(name: str, logits: np.ndarray) -> np.ndarray:
    """The largest error of each row over its tolerance."""
    wanted = golden(name)
    errors = np.abs(logits - wanted.logits).max(axis=-1)
    return np.where(wanted.real, errors, 0.0).max(axis=-1) / wanted.tolerance


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_float32_is_within_the_references_own_noise(name: str, mesh: tuple[int, int]) -> None:
    wanted, logits = golden(name), answer(name, mesh)
    assert logits.dtype == np.float32
    assert logits.shape == wanted.logits.shape
    assert np.isfinite(logits).all()
    assert misses(name, logits).max() <= 1.0


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama3", (1, 8)),  # two key and value heads are repeated for eight devices
        ("qwen2p5_tied", (1, 8)),  # fourteen heads stay whole
        ("qwen3_moe", (4, 2)),  # rows do not divide by four
        *(
            pytest.param(name, mesh, marks=pytest.mark.soak)
            for name in VARIANTS
            for mesh in ((1, 8), (8, 1), (4, 2))
        ),
    ],
    ids=str,
)
def test_float32_on_eight_devices(name: str, mesh: tuple[int, int]) -> None:
    assert misses(name, answer(name, mesh)).max() <= 1.0


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_is_no_further_from_the_truth_than_transformers(name: str) -> None:
    wanted = golden(name)
    errors = np.abs(answer(name, (1, 1), "bfloat16") - wanted.logits).mean(axis=-1)
    theirs = np.broadcast_to(wanted.bf16_error[:, None], errors.shape)
    assert 0 < errors[wanted.real].mean() <= theirs[wanted.real].mean()


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_has_the_same_bits_whatever_its_neighbours(name: str, mesh: tuple[int, int]) -> None:
    """Every other row is exchanged for the one before it."""
    wanted = golden(name)
    tokens, segments, positions = (
        np.where(np.arange(len(x))[:, None] % 2, np.roll(x, 1, axis=0), x)
        for x in (wanted.tokens, wanted.segments, wanted.positions)
    )
    decoder = model(name, mesh, "float32")
    logits = run(decoder, tokens, positions=positions, segment_ids=segments)
    kept = wanted.real & (np.arange(len(tokens)) % 2 == 0)[:, None]
    assert kept.any(axis=1).sum() == 7
    assert (logits == answer(name, mesh))[kept].all()


@pytest.mark.parametrize("name", ["gemma3_text_mqa", "llama3"])
def test_positions_left_out_are_counted_within_segments(name: str) -> None:
    wanted = golden(name)
    counted = segment_positions(jnp.asarray(wanted.tokens), jnp.asarray(wanted.segments))
    assert (np.asarray(counted) == wanted.positions)[wanted.real].all()
    logits = run(model(name, (1, 1), "float32"), wanted.tokens, segment_ids=wanted.segments)
    assert (logits == answer(name, (1, 1)))[wanted.real].all()


def test_positions_without_segments_count_the_whole_row() -> None:
    counted = segment_positions(jnp.zeros((2, 4), jnp.int32), None)
    assert counted.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_one_segment_a_row_is_assumed() -> None:
    wanted = golden("llama3")
    assert wanted.real[LONG].all()
    logits = run(model("llama3", (1, 1), "float32"), wanted.tokens)
    assert (logits[LONG] == answer("llama3", (1, 1))[LONG]).all()


def test_every_norm_uses_the_epsilon_of_the_config() -> None:
    """A stream a thousand times smaller, under an epsilon to match, gives the same logits."""
    wanted, loaded, scale = golden("llama3"), model("llama3", (1, 1), "float32"), 2.0**-10
    writers = ("embed", "layers.attn.o", "layers.mlp.down")
    params = {name: x * scale if name in writers else x for name, x in loaded.params.items()}
    config = replace(loaded.config, norm_eps=1e-5 * scale**2)
    small = Decoder(config, loaded.mesh, params, "float32")
    assert misses("llama3", run(small, wanted.tokens, segment_ids=wanted.segments)).max() <= 1.0


def rotary_sets() -> Iterator[tuple[int, float, RopeScaling | None]]:
    for config in PRESETS.values():
        yield config.head_dim, config.rope_theta, config.rope_scaling
        if config.rope_local_theta:
            yield config.head_dim, config.rope_local_theta, config.rope_local_scaling


@pytest.mark.parametrize(("head_dim", "theta", "scaling"), sorted(set(rotary_sets()), key=str))
def test_rotary_frequencies_are_those_of_transformers(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> None:
    """All but a few to the bit: one bit moves the last angles of a long row by milliradians."""
    kind, factor = (scaling.kind, scaling.factor) if scaling else ("default", 1.0)
    with np.load(ROTARY) as reference:
        wanted = reference[f"{head_dim} {float(theta)} {kind} {float(factor)}"]
    found = rotary_frequencies(head_dim, theta, scaling)
    assert found.dtype == np.float32
    np.testing.assert_array_max_ulp(found, wanted, maxulp=2)
    assert (found == wanted).mean() >= 0.95


def mask_of(segments: np.ndarray) -> np.ndarray:
    """Who sees whom, as `make_golden.py` defines segments; windows apart."""
    index = np.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return same & (segments > 0)[:, :, None] & (index[None, :] <= index[:, None])


@pytest.mark.parametrize("name", ["gemma2", "qwen2p5_tied"])
def test_an_attention_mask_says_the_same_as_segments(name: str) -> None:
    wanted, decoder = golden(name), model(name, (1, 1), "float32")
    mask = mask_of(wanted.segments)
    logits = run(decoder, wanted.tokens, positions=wanted.positions, attention_mask=mask)
    assert misses(name, logits).max() <= 1.0


@pytest.mark.parametrize(
    ("name", "mesh", "masked", "before"),
    [
        ("gemma3_text_mqa", (1, 1), False, 230),
        ("llama3", (2, 2), False, 440),
        ("gemma2", (1, 1), True, 230),
    ],
    ids=str,
)
def test_rows_longer_than_a_block_of_queries(
    name: str, mesh: tuple[int, int], masked: bool, before: int
) -> None:
    """The long case behind another segment: it lies across blocks, or in the second one."""
    wanted = golden(name)
    tokens = np.concatenate([np.arange(before) % 300 + 3, wanted.tokens[LONG]])[None]
    segments = np.repeat([1, 2], [before, LENGTH])[None]
    how = {"attention_mask": mask_of(segments)} if masked else {"segment_ids": segments}
    logits = run(model(name, mesh, "float32"), tokens, **how)
    assert logits.shape == (1, before + LENGTH, wanted.logits.shape[-1])
    errors = np.abs(logits[0, before:] - wanted.logits[LONG])
    assert errors.max() <= wanted.tolerance[LONG]


def test_what_follows_a_token_is_not_seen() -> None:
    wanted = golden("llama3p1")
    tokens = np.concatenate([wanted.tokens[LONG], np.arange(228) + 3])[None]
    logits = run(model("llama3p1", (1, 1), "float32"), tokens)
    errors = np.abs(logits[0, :LENGTH] - wanted.logits[LONG])
    assert errors.max() <= wanted.tolerance[LONG]


def test_calls_that_are_refused() -> None:
    decoder, tokens = model("llama3", (1, 1), "float32"), jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="not both"):
        decoder(tokens, attention_mask=jnp.ones((1, 2, 2), bool), segment_ids=tokens)
