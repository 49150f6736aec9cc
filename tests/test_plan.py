"""The plan: every misfit in one short error, and sizes that placement keeps to the byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import GOLDEN, VARIANTS, mesh_of, open_folder, stored_tensors
from moorage_models.automodel import load
from moorage_models.config import ModelConfig
from moorage_models.errors import ModelError, Reason
from moorage_models.headers import StoredTensor
from moorage_models.plan import make_plan, preset_plan

L = "model.layers."
LLAMA = ModelConfig(
    family="llama3",
    num_layers=3,
    vocab_size=320,
    embed_dim=64,
    hidden_dim=96,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
)
# what a Llama layer holds, with heads x head_dim, as the published checkpoints name it
LAYER = {
    "input_layernorm.weight": (64,),
    "self_attn.q_proj.weight": (128, 64),
    "self_attn.k_proj.weight": (32, 64),
    "self_attn.v_proj.weight": (32, 64),
    "self_attn.o_proj.weight": (64, 128),
    "post_attention_layernorm.weight": (64,),
    "mlp.gate_proj.weight": (96, 64),
    "mlp.up_proj.weight": (96, 64),
    "mlp.down_proj.weight": (64, 96),
}
OUTSIDE = {
    "model.embed_tokens.weight": (320, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (320, 64),
}
Shapes = Mapping[str, tuple[int, ...]]


def llama(layers: int = 3) -> dict[str, tuple[int, ...]]:
    return OUTSIDE | {f"{L}{i}.{name}": x for i in range(layers) for name, x in LAYER.items()}


def stored(shapes: Shapes, dtype: str = "bfloat16") -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(name, "model.safetensors", dtype, shape, 0)
        for name, shape in shapes.items()
    }


def misfits(
    shapes: Shapes, config: ModelConfig = LLAMA, reason: Reason = Reason.CHECKPOINT_MISMATCH
) -> list[str]:
    with pytest.raises(ModelError) as caught:
        make_plan(config, stored(shapes))
    assert caught.value.reason is reason
    return caught.value.message.splitlines()[1:]


def test_a_checkpoint_that_fits() -> None:
    plan = make_plan(LLAMA, stored(llama()))
    assert {p.name: p.shape for p in plan.parameters} == {
        "embed": (320, 64),
        "head": (320, 64),
        "final_norm": (64,),
        "layers.attn_norm": (3, 64),
        "layers.attn.q": (3, 128, 64),
        "layers.attn.k": (3, 32, 64),
        "layers.attn.v": (3, 32, 64),
        "layers.attn.o": (3, 64, 128),
        "layers.mlp_norm": (3, 64),
        "layers.mlp.gate": (3, 96, 64),
        "layers.mlp.up": (3, 96, 64),
        "layers.mlp.down": (3, 64, 96),
    }
    for parameter in plan.parameters:
        assert [piece.index for piece in parameter.pieces] == (
            [(0,), (1,), (2,)] if parameter.name.startswith("layers.") else [()]
        )
    down = next(p for p in plan.parameters if p.name == "layers.mlp.down")
    assert [piece.tensor.name for piece in down.pieces] == [
        f"{L}{i}.mlp.down_proj.weight" for i in range(3)
    ]
    assert list(plan.files) == ["model.safetensors"]
    assert plan.dtype == "bfloat16"


@pytest.mark.parametrize("name", VARIANTS)
def test_golden_checkpoints_fit_and_every_tensor_is_used_once(name: str) -> None:
    plan = open_folder(GOLDEN / name).plan
    used = [piece.tensor.name for p in plan.parameters for piece in p.pieces]
    used += [tensor.name for tensor, _ in plan.duplicates]
    wanted = {key for key in stored_tensors(GOLDEN / name) if "vision" not in key}
    wanted = {key for key in wanted if "multi_modal_projector" not in key}
    assert sorted(used) == sorted(wanted)


def test_missing_in_several_layers_is_one_line() -> None:
    shapes = llama()
    for i in (0, 2):
        del shapes[f"{L}{i}.mlp.up_proj.weight"]
    assert misfits(shapes) == [
        f"layers.mlp.up: no tensor {L}0.mlp.up_proj.weight and 1 more like it"
    ]


def test_a_wrong_shape_says_both() -> None:
    shapes = llama() | {f"{L}1.self_attn.o_proj.weight": (128, 64)}
    assert misfits(shapes) == [
        f"layers.attn.o: {L}1.self_attn.o_proj.weight has shape [128, 64], wanted [64, 128]"
    ]


def test_tensors_left_over_are_told_by_kind() -> None:
    more = {f"{L}{i}.self_attn.q_norm.weight": (16,) for i in range(3)}
    assert misfits(llama() | more | {"extra.bias": (3,)}) == [
        f"no parameter for tensor {L}0.self_attn.q_norm.weight and 2 more like it",
        "no parameter for tensor extra.bias",
    ]


def test_layers_beyond_the_config_are_left_over() -> None:
    lines = misfits(llama(layers=4))
    assert len(lines) == len(LAYER)
    assert f"no parameter for tensor {L}3.mlp.gate_proj.weight" in lines


def test_everything_at_once() -> None:
    shapes = llama() | {"model.norm.weight": (65,), "stray": (1,)}
    del shapes["lm_head.weight"], shapes[f"{L}1.input_layernorm.weight"]
    shapes[f"{L}0.input_layernorm.weight"] = (64, 1)
    assert sorted(misfits(shapes)) == [
        "final_norm: model.norm.weight has shape [65], wanted [64]",
        "head: no tensor lm_head.weight",
        f"layers.attn_norm: {L}0.input_layernorm.weight has shape [64, 1], wanted [64]",
        f"layers.attn_norm: no tensor {L}1.input_layernorm.weight",
        "no parameter for tensor stray",
    ]


def test_the_message_stays_short_for_a_deep_model() -> None:
    deep = replace(LLAMA, num_layers=80)
    none_right = {f"x.{name}": shape for name, shape in llama(layers=80).items()}
    lines = misfits(none_right, deep)
    assert len(lines) == 12 + 12  # one a parameter, one a kind of tensor
    assert f"layers.attn.q: no tensor {L}0.self_attn.q_proj.weight and 79 more like it" in lines
    assert sum(map(len, lines)) < 2500


def test_experts_are_counted_over_layers_and_experts() -> None:
    checkpoint = open_folder(GOLDEN / "qwen3_moe")
    tensors = {
        piece.tensor.name: piece.tensor for p in checkpoint.plan.parameters for piece in p.pieces
    }
    gate = next(p for p in checkpoint.plan.parameters if p.name == "layers.moe.gate")
    assert gate.shape == (2, 8, 24, 48)
    assert [piece.index for piece in gate.pieces] == [(i, e) for i in range(2) for e in range(8)]
    assert gate.pieces[11].tensor.name == f"{L}1.mlp.experts.3.gate_proj.weight"
    del tensors[f"{L}0.mlp.experts.7.up_proj.weight"], tensors[f"{L}1.mlp.experts.0.up_proj.weight"]
    with pytest.raises(ModelError) as caught:
        make_plan(checkpoint.config, tensors)
    assert caught.value.message.splitlines()[1:] == [
        f"layers.moe.up: no tensor {L}0.mlp.experts.7.up_proj.weight and 1 more like it"
    ]


def test_a_tied_head_may_be_left_out_or_stored_twice() -> None:
    tied = replace(LLAMA, tied=True)
    without = {name: shape for name, shape in llama().items() if name != "lm_head.weight"}
    assert make_plan(tied, stored(without)).duplicates == ()
    ((tensor, parameter),) = make_plan(tied, stored(llama())).duplicates
    assert (tensor.name, parameter) == ("lm_head.weight", "embed")


def folder_with(tmp_path: Path, name: str, **changed: np.ndarray) -> Path:
    """A golden checkpoint of one file with some of its tensors changed."""
    tensors = dict(stored_tensors(GOLDEN / name)) | changed
    save_file(tensors, tmp_path / "model.safetensors")
    config = (GOLDEN / name / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    return tmp_path


@pytest.mark.parametrize("changed", ["a bit", "the dtype", "the shape"])
def test_a_tied_head_that_differs_is_refused_at_placement(changed: str, tmp_path: Path) -> None:
    head = stored_tensors(GOLDEN / "qwen3_tied")["lm_head.weight"].copy()
    if changed == "a bit":
        head.view(np.uint16)[-1, -1] ^= 1
    head = head.view(np.float16) if changed == "the dtype" else head
    head = head[:-1] if changed == "the shape" else head
    checkpoint = open_folder(folder_with(tmp_path, "qwen3_tied", **{"lm_head.weight": head}))
    with pytest.raises(ModelError) as caught:
        load(checkpoint, mesh_of(1, 1))
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
    assert "lm_head.weight differs from model.embed_tokens.weight" in caught.value.message


def test_a_tied_head_that_is_equal_is_no_parameter() -> None:
    params, _ = load(open_folder(GOLDEN / "qwen3_tied"), mesh_of(1, 1))
    assert "lm_head.weight" in stored_tensors(GOLDEN / "qwen3_tied")
    assert "head" not in params


@pytest.mark.parametrize("name", ["gemma3_mm_4b", "gemma3_mm_27b"])
def test_both_prefixes_of_gemma_3_and_its_vision_tensors(name: str) -> None:
    names = stored_tensors(GOLDEN / name).keys()
    prefix = "language_model.model." if name == "gemma3_mm_4b" else "model.language_model."
    assert any(key.startswith(prefix) for key in names)
    assert any("vision_tower." in key for key in names)
    plan = open_folder(GOLDEN / name).plan
    embed = next(p for p in plan.parameters if p.name == "embed")
    assert embed.pieces[0].tensor.name == f"{prefix}embed_tokens.weight"
    assert not any("vision" in piece.tensor.name for p in plan.parameters for piece in p.pieces)


def test_one_tensor_under_both_prefixes_is_a_misfit() -> None:
    checkpoint = open_folder(GOLDEN / "gemma3_mm_4b")
    tensors = {
        piece.tensor.name: piece.tensor for p in checkpoint.plan.parameters for piece in p.pieces
    }
    twin = "model.language_model.norm.weight"
    tensors[twin] = replace(tensors["language_model.model.norm.weight"], name=twin)
    with pytest.raises(ModelError) as caught:
        make_plan(checkpoint.config, tensors)
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
    assert "norm.weight" in caught.value.message


def test_rotary_frequencies_are_no_misfit() -> None:
    make_plan(LLAMA, stored(llama() | {f"{L}0.self_attn.rotary_emb.inv_freq": (8,)}))


def test_a_quantised_tensor_is_refused() -> None:
    name = f"{L}1.mlp.up_proj.weight"
    tensors = stored(llama())
    tensors[name] = replace(tensors[name], dtype="F8_E4M3")
    with pytest.raises(ModelError) as caught:
        make_plan(LLAMA, tensors)
    assert caught.value.reason is Reason.CHECKPOINT_UNSUPPORTED
    assert name in caught.value.message
    assert "F8_E4M3" in caught.value.message


def test_a_quantised_tensor_that_is_not_needed_is_no_matter() -> None:
    checkpoint = open_folder(GOLDEN / "gemma3_mm_4b")
    tensors = {
        piece.tensor.name: piece.tensor for p in checkpoint.plan.parameters for piece in p.pieces
    }
    more = StoredTensor("vision_tower.x", "model.safetensors", "I8", (4,), 0)
    make_plan(checkpoint.config, tensors | {"vision_tower.x": more})


@pytest.mark.parametrize(
    ("dtypes", "wide"),
    [
        (("bfloat16",) * 3, "bfloat16"),
        (("bfloat16", "float32", "bfloat16"), "float32"),
        (("float16", "float32", "float16"), "float32"),
        (("bfloat16", "float16", "bfloat16"), "float32"),
        (("float16",) * 3, "float16"),
    ],
    ids=str,
)
def test_a_stack_of_several_dtypes_is_widened(dtypes: tuple[str, ...], wide: str) -> None:
    tensors = stored(llama())
    for i, dtype in enumerate(dtypes):
        name = f"{L}{i}.mlp.up_proj.weight"
        tensors[name] = replace(tensors[name], dtype=dtype)
    plan = make_plan(LLAMA, tensors)
    found = {p.name: p.dtype for p in plan.parameters}
    assert found.pop("layers.mlp.up") == wide
    assert set(found.values()) == {"bfloat16"}
    assert {p.dtype for p in make_plan(LLAMA, tensors, "float16").parameters} == {"float16"}


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2), (1, 8), (8, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("name", ["llama3_oddvocab", "qwen3_moe", "llama3_mixed_dtype", "gemma2"])
def test_device_bytes_are_those_that_placement_uses(name: str, mesh: tuple[int, int]) -> None:
    checkpoint = open_folder(GOLDEN / name)
    params, _ = load(checkpoint, mesh_of(*mesh))
    held = dict.fromkeys(jax.devices()[: mesh[0] * mesh[1]], 0)
    for value in params.values():
        for shard in value.addressable_shards:
            held[shard.device] += shard.data.nbytes
    planned = checkpoint.plan.device_bytes(dict(zip(("fsdp", "tp"), mesh, strict=True)))
    assert set(held.values()) == {planned}


def test_the_sizes_of_a_preset_need_no_checkpoint() -> None:
    plan = preset_plan(LLAMA)
    # 2 x 320 x 64 outside, 64 of the last norm, 39,040 a layer; two bytes each
    assert plan.device_bytes({"fsdp": 1, "tp": 1}) == 2 * (2 * 320 * 64 + 64 + 3 * 39_040)
    assert preset_plan(LLAMA, "float32").device_bytes({}) == 4 * (2 * 320 * 64 + 64 + 3 * 39_040)
    assert LLAMA.num_parameters == 2 * 320 * 64 + 64 + 3 * 39_040
