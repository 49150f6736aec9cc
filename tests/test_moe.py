"""Mixture of experts: both functions, every mesh, the same numbers, whatever the neighbours."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import GOLDEN, mesh_of, open_folder, stored_tensors
from moorage_models import moe
from moorage_models.automodel import load
from moorage_models.decoder import Decoder

MESHES = [(1, 1), (2, 2), *(pytest.param(m, marks=pytest.mark.soak) for m in ((1, 8), (8, 1)))]


def decoder(name: str, shape: tuple[int, int]) -> Decoder:
    checkpoint, mesh = open_folder(GOLDEN / name, dtype="float32"), mesh_of(*shape)
    params, _ = load(checkpoint, mesh)
    return Decoder(checkpoint.config, mesh, params, "float32")


@pytest.fixture(params=["one_by_one", "grouped"])
def function(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # The tests run on CPU, where `one_by_one` is what is chosen.
    monkeypatch.setattr(moe, "one_by_one", getattr(moe, request.param))
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_rawtopk"])
def test_both_functions_give_the_golden_logits(
    name: str, shape: tuple[int, int], function: str
) -> None:
    with np.load(GOLDEN / name / "golden.npz") as golden:
        tokens, segments = golden["plain/tokens"], golden["plain/segments"]
        wanted, noise = golden["plain/logits"], golden["plain/noise"]
    rows = np.tile(tokens, (4, 1))
    logits, _ = decoder(name, shape)(rows, segment_ids=np.tile(segments, (4, 1)))
    assert np.abs(np.asarray(logits)[: len(tokens)] - wanted).max() <= 3 * noise + 2e-5


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_fused_experts_are_the_same_parameters(shape: tuple[int, int], tmp_path: Path) -> None:
    """As newer transformers may store them: gate rows before up rows, all experts together."""
    source = GOLDEN / "qwen3_moe"
    tensors = dict(stored_tensors(source))
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([tensors.pop(f"{experts}.{e}.{part}_proj.weight") for e in range(8)])
            for part in ("gate", "up", "down")
        )
        tensors[f"{experts}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{experts}.down_proj"] = down
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", tmp_path)
    mesh = mesh_of(*shape)
    fused, _ = load(open_folder(tmp_path), mesh)
    apart, _ = load(open_folder(source), mesh)
    for name, value in apart.items():
        assert np.array_equal(np.asarray(fused[name]), np.asarray(value)), name


def test_a_row_keeps_its_bits_beside_other_rows(function: str) -> None:
    model = decoder("qwen3_moe", (1, 1))
    generator = np.random.default_rng(0)
    rows = generator.integers(3, 300, (4, 32)).astype(np.int32)
    others = generator.integers(3, 300, (4, 32)).astype(np.int32)
    others[2] = rows[0]
    one, two = np.asarray(model(rows)[0]), np.asarray(model(others)[0])
    assert np.array_equal(one[0].view(np.int32), two[2].view(np.int32))
