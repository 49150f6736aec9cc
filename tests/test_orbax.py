"""Flax and MaxText checkpoints: the same parameters as the safetensors of the same model.

Bit for bit where the writer folded nothing into the values, to float32 rounding where it did. The
checkpoints are written by `orbax_fixtures`, which knows nothing of the reader.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import GOLDEN, mesh_of, open_folder
from moorage_models import zarr_chunks
from moorage_models.arena import Arena
from moorage_models.automodel import load
from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.decoder import Decoder
from moorage_models.errors import ModelError, Reason
from moorage_models.placement import ArenaPlacer, Placer
from moorage_models.ring import RingPlacer
from moorage_models.sources import ModelRequest, ModelSource
from orbax_fixtures import write_flax, write_maxtext

FLAX = [
    "gemma1_mqa",
    "gemma1_mha",
    "gemma2",
    "gemma2_qscale",
    "gemma3_text_mqa",
    "gemma3_mm_4b",
    "gemma3_mm_27b",
]
MAXTEXT = [
    *FLAX,
    "llama3",
    "llama3p1",
    "qwen2p5_tied",
    "qwen2p5_untied",
    "qwen3_tied",
    "qwen3_untied",
    "qwen3_moe",
]
#: Parameters that MaxText folds something into, by the beginning of the variant's name.
FOLDED = {
    "llama3": ("attn.q",),
    "gemma1": ("embed", "norm", "attn.q"),
    "gemma2": ("embed", "norm", "attn.q"),
    "gemma3": ("embed", "norm"),
}
#: What has to be said of the tiny variants; of the published sizes, mostly nothing.
SAID = {
    "llama3": {"maxtext_rotary": "halves"},
    "llama3p1": {"maxtext_rotary": "interleaved"},
    "gemma1_mqa": {"maxtext_embedding_scale": "float32"},
    "gemma1_mha": {"maxtext_embedding_scale": "float32"},
    "gemma2": {"maxtext_embedding_scale": "float32"},
    "gemma2_qscale": {
        "maxtext_embedding_scale": "float32",
        "maxtext_query_scale": "head_dim",
    },
}


#: Each kind of layer, fold and axis once in the suite; the rest in `make soak`.
QUICK = {"gemma1_mha", "gemma2", "gemma3_mm_4b", "llama3p1", "qwen2p5_untied", "qwen3_moe"}


def variants(names: list[str], quick: set[str] = QUICK) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.soak) for name in names]


def opened(folder: Path, name: str, options: Mapping[str, str] | None = None) -> Checkpoint:
    """A tree with the model's own config.json beside it."""
    shutil.copy(GOLDEN / name / "config.json", folder / "config.json")
    said = tuple(sorted((SAID.get(name, {}) if options is None else options).items()))
    return open_checkpoint(ModelRequest("tiny", ModelSource.INTERNAL, str(folder), options=said))


@functools.cache
def safetensors(name: str) -> dict[str, np.ndarray]:
    return parameters(open_folder(GOLDEN / name))


def parameters(
    checkpoint: Checkpoint, shape: tuple[int, int] = (1, 1), placer: Placer | None = None
) -> dict[str, Any]:
    params, _ = load(checkpoint, mesh_of(*shape), placer=placer)
    return {name: np.asarray(x) for name, x in params.items()}


def check(found: Mapping[str, np.ndarray], name: str, folded: tuple[str, ...] = ()) -> None:
    wanted = safetensors(name)
    assert found.keys() == wanted.keys()
    for parameter, value in found.items():
        mine, theirs = value.astype(np.float32), wanted[parameter].astype(np.float32)
        if parameter.endswith(folded) and folded:
            np.testing.assert_allclose(mine, theirs, rtol=3e-7, atol=2e-7, err_msg=parameter)
        else:
            assert np.array_equal(mine, theirs), parameter


def folded_of(name: str) -> tuple[str, ...]:
    return next((ends for start, ends in FOLDED.items() if name.startswith(start)), ())


@pytest.mark.parametrize("name", variants(FLAX))
def test_flax_is_bit_equal(name: str, tmp_path: Path) -> None:
    checkpoint = opened(write_flax(GOLDEN / name, tmp_path), name)
    found = parameters(checkpoint, (2, 2))
    check(found, name)
    assert {x.dtype.name for x in found.values()} == {"bfloat16"}


@pytest.mark.parametrize(
    "settings",
    [
        {"ocdbt": False},
        {"vocab_rows": 344},
        {"gating": "DF"},
        {"nested": True},
        {"dtype": np.float32},
    ],
    ids=str,
)
def test_flax_in_its_other_forms(settings: dict[str, Any], tmp_path: Path) -> None:
    write_flax(GOLDEN / "gemma2", tmp_path, **settings)
    check(parameters(opened(tmp_path, "gemma2")), "gemma2")  # beside the tokenizer


@pytest.mark.parametrize("name", variants(MAXTEXT))
def test_maxtext_scanned_is_equal(name: str, tmp_path: Path) -> None:
    checkpoint = opened(write_maxtext(GOLDEN / name, tmp_path, scanned=True), name)
    check(parameters(checkpoint), name, folded_of(name))


@pytest.mark.parametrize("name", variants(MAXTEXT, {"gemma2", "gemma3_text_mqa"}))
def test_maxtext_unscanned_is_equal(name: str, tmp_path: Path) -> None:
    checkpoint = opened(write_maxtext(GOLDEN / name, tmp_path, scanned=False), name)
    check(parameters(checkpoint, (2, 2)), name, folded_of(name))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("qwen3_tied", {"form": form}) for form in ("A", "B", "C", "D", "SFT", "RL")),
        ("qwen3_tied", {"ocdbt": False}),
        ("qwen3_tied", {"ocdbt": False, "zarr3": False}),
        ("qwen3_tied", {"zarr3": False}),
        ("qwen3_tied", {"devices": 8}),
        ("qwen3_tied", {"trained": True}),
        ("qwen3_tied", {"metadata": False}),
        ("qwen3_untied", {"vocab_rows": 384}),
        ("qwen3_untied", {"fused_qkv": True, "fused_mlp": True}),
        ("qwen2p5_untied", {"fused_qkv": True}),
        ("qwen3_moe", {"prefuse_moe_weights": True}),
        ("gemma3_text_mqa", {"old_gemma3": True}),
    ],
    ids=str,
)
def test_maxtext_in_its_other_forms(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    write_maxtext(GOLDEN / name, tmp_path, scanned=True, **settings)
    check(parameters(opened(tmp_path, name)), name, folded_of(name))


def test_the_older_converters_are_told_by_options(tmp_path: Path) -> None:
    settings = {"old_27b_query": True, "old_embedding": True}
    folder = write_maxtext(GOLDEN / "gemma2_qscale", tmp_path, scanned=True, **settings)
    options = {"maxtext_query_scale": "query_scale", "maxtext_embedding_scale": "bfloat16"}
    found = parameters(opened(folder, "gemma2_qscale", options))
    check(found, "gemma2_qscale", folded_of("gemma2_qscale"))


@pytest.mark.parametrize("name", sorted(SAID))
def test_what_a_file_does_not_tell_is_asked_for(name: str, tmp_path: Path) -> None:
    folder = write_maxtext(GOLDEN / name, tmp_path, scanned=True)
    for missing in SAID[name]:
        options = {k: v for k, v in SAID[name].items() if k != missing}
        with pytest.raises(ModelError, match=missing) as caught:
            opened(folder, name, options)
        assert caught.value.reason is Reason.INVALID_REQUEST
    with pytest.raises(ModelError, match="unknown options speed"):
        opened(folder, name, {**SAID[name], "speed": "high"})


def test_a_llama_says_its_rotary_order_by_its_name(tmp_path: Path) -> None:
    folder = write_maxtext(GOLDEN / "llama3p1", tmp_path, scanned=True)
    shutil.copy(GOLDEN / "llama3p1" / "config.json", folder / "config.json")
    request = ModelRequest("meta-llama/Llama-3.1-8B", ModelSource.INTERNAL, str(folder))
    check(parameters(open_checkpoint(request)), "llama3p1", FOLDED["llama3"])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("gemma2", write_flax),
        ("gemma3_text_mqa", functools.partial(write_maxtext, scanned=True)),
        ("llama3p1", functools.partial(write_maxtext, scanned=True)),
    ],
    ids=["flax", "maxtext", "maxtext interleaved"],
)
def test_the_logits_are_the_golden_ones(name: str, write: Any, tmp_path: Path) -> None:
    checkpoint = opened(write(GOLDEN / name, tmp_path, dtype=np.float32), name)
    mesh = mesh_of(2, 2)
    model = Decoder(checkpoint.config, mesh, load(checkpoint, mesh)[0], "float32")
    with np.load(GOLDEN / name / "golden.npz") as golden:
        logits = np.asarray(model(golden["plain/tokens"])[0])
        error = np.abs(logits - golden["plain/logits"]).max()
        assert error <= 3 * golden["plain/noise"] + 2e-5


#: Half a head a device, layers in strides, heads in one axis, experts; whole chunks and many.
WAYS = {
    "gemma2": functools.partial(write_flax),
    "gemma3_text_mqa": functools.partial(write_maxtext, scanned=True),
    "llama3p1": functools.partial(write_maxtext, scanned=True, devices=8),
    "qwen3_untied": functools.partial(write_maxtext, scanned=True, fused_qkv=True, fused_mlp=True),
    "qwen3_moe": functools.partial(write_maxtext, scanned=False),
}


#: One mesh and one cut of each in the suite; the rest in `make soak`.
MESHES = {(2, 2): 3000, (8, 1): 1 << 20, (1, 8): 20_000}
SOON = {("gemma2", (8, 1))}


@pytest.mark.parametrize(
    ("name", "mesh", "slab_bytes"),
    [
        pytest.param(name, mesh, size, marks=[] if (name, mesh) in SOON else pytest.mark.soak)
        for name, (mesh, size) in itertools.product(WAYS, MESHES.items())
    ],
    ids=str,
)
def test_both_placers_give_the_same_bits(
    name: str, mesh: tuple[int, int], slab_bytes: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(zarr_chunks, "SLAB_BYTES", slab_bytes)
    checkpoint = opened(WAYS[name](GOLDEN / name, tmp_path), name)
    arena, ring = (parameters(checkpoint, mesh, p) for p in (ArenaPlacer(Arena()), RingPlacer()))
    check(arena, name, folded_of(name))
    for parameter, value in arena.items():
        assert value.dtype == ring[parameter].dtype
        assert value.tobytes() == ring[parameter].tobytes(), parameter


def test_what_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    folder = write_maxtext(GOLDEN / "qwen3_tied", tmp_path, scanned=True)
    with pytest.raises(ModelError) as caught:
        opened(folder, "qwen3_moe")
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
    assert "layers.moe.gate: no array decoder/" in caught.value.message
    assert "no parameter for array decoder/layers/mlp/wi_0/kernel" in caught.value.message


def test_a_damaged_tree_is_told(tmp_path: Path) -> None:
    folder = write_flax(GOLDEN / "gemma2", tmp_path)
    (folder / "_METADATA").write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        opened(folder, "gemma2")
    assert caught.value.reason is Reason.CHECKPOINT_CORRUPT


def test_damaged_arrays_are_told(tmp_path: Path) -> None:
    folder = write_flax(GOLDEN / "gemma2", tmp_path)
    for path in folder.rglob("d/*"):
        path.write_bytes(b"")
    shutil.copy(GOLDEN / "gemma2" / "config.json", folder / "config.json")
    # In a process of its own: Orbax leaves other arrays' answers to an event loop that is closed,
    # which Python prints.
    script = (
        "import jax, sys; from moorage_models import *\n"
        "mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'))\n"
        "try: AutoModel.from_pretrained('x', mesh, ModelSource.INTERNAL, sys.argv[1])\n"
        "except ModelError as error: print(error.reason)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["CHECKPOINT_CORRUPT"]


def test_several_trees_have_to_be_told_apart(tmp_path: Path) -> None:
    write_flax(GOLDEN / "gemma2", tmp_path / "one")
    write_flax(GOLDEN / "gemma2", tmp_path / "two")
    with pytest.raises(ModelError, match="one/gemma2, two/gemma2"):
        opened(tmp_path, "gemma2")
