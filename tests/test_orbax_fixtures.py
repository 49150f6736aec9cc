"""The Orbax fixtures by themselves: names, shapes and folds, restored by Orbax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open

from orbax_fixtures import write_flax, write_maxtext

GOLDEN = Path(__file__).parent / "golden"
SCANNED = ["llama3", "llama3_oddvocab", "gemma1_mqa", "gemma1_mha", "gemma2_qscale", "qwen3_tied"]
BOTH = ["llama3p1", "gemma2", "gemma3_text_mqa", "gemma3_mm_27b", "qwen2p5_untied", "qwen3_moe"]


def restore(path: Path) -> dict[str, np.ndarray]:
    """A checkpoint's arrays under their paths, joined by dots."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path.absolute()).item_metadata.tree
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        tree = checkpointer.restore(path.absolute(), restore_args=whole)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="."): leaf for keys, leaf in leaves}


def maxtext(variant: str, out: Path, **options: Any) -> dict[str, np.ndarray]:
    arrays = restore(write_maxtext(GOLDEN / variant, out, **options))
    return {k.removeprefix("params.params."): a for k, a in arrays.items()}


def golden(variant: str) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in (GOLDEN / variant).glob("*.safetensors"):
        with safe_open(path, "np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def hf(variant: str, name: str) -> np.ndarray:
    """A golden tensor, in float32."""
    return golden(variant)[name].astype(np.float32)


def metadata(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


SHAPES: dict[tuple[str, bool], dict[str, tuple[int, ...]]] = {
    ("llama3", True): {
        "token_embedder.embedding": (320, 64),
        "decoder.decoder_norm.scale": (64,),
        "decoder.logits_dense.kernel": (64, 320),
        "decoder.layers.self_attention.query.kernel": (64, 2, 8, 16),
        "decoder.layers.self_attention.key.kernel": (64, 2, 2, 16),
        "decoder.layers.self_attention.out.kernel": (8, 2, 16, 64),
        "decoder.layers.mlp.wi_0.kernel": (64, 2, 96),
        "decoder.layers.mlp.wo.kernel": (96, 2, 64),
        "decoder.layers.pre_self_attention_layer_norm.scale": (64, 2),
        "decoder.layers.post_self_attention_layer_norm.scale": (64, 2),
    },
    ("gemma1_mqa", False): {
        "decoder.layers_1.self_attention.value.kernel": (48, 1, 16),
        "decoder.layers_1.pre_self_attention_norm.scale": (48,),
        "decoder.layers_1.pre_ffw_norm.scale": (48,),
    },
    ("gemma2", True): {
        "decoder.layers.self_attention_local.query.kernel": (48, 2, 4, 16),
        "decoder.layers.mlp_global.wi_1.kernel": (48, 2, 96),
        "decoder.layers.post_ffw_norm_global.scale": (48, 2),
    },
    ("gemma2", False): {"decoder.layers_1.self_attention_global.out.kernel": (4, 16, 48)},
    ("gemma3_mm_4b", True): {
        "decoder.layers.layers_5.self_attention.query.kernel": (48, 1, 4, 16),
        "decoder.layers.layers_0.self_attention.key_norm.scale": (16, 1),
        "decoder.layers_remainder.layers_1.self_attention.query.kernel": (48, 4, 16),
        "vision_encoder.VisionEmbedder_0.mm_input_projection.w": (24, 48),
        "vision_encoder.Gemma3VisionEncoderLayer_0.embedding.kernel": (14, 14, 3, 24),
    },
    ("gemma3_mm_4b", False): {"decoder.layers_7.self_attention.query_norm.scale": (16,)},
    ("qwen2p5_tied", True): {"decoder.layers.self_attention.query.bias": (14, 2, 4)},
    ("qwen3_moe", True): {
        "decoder.layers.moe_block.gate.kernel": (48, 2, 8),
        "decoder.layers.moe_block.wi_0": (8, 2, 48, 24),
        "decoder.layers.moe_block.wo": (8, 2, 24, 48),
    },
    ("qwen3_moe", False): {"decoder.layers_0.moe_block.wi_1": (8, 48, 24)},
}


@pytest.mark.parametrize(("variant", "scanned"), SHAPES)
def test_maxtext_shapes(variant: str, scanned: bool, tmp_path: Path) -> None:
    arrays = maxtext(variant, tmp_path, scanned=scanned)
    shapes = SHAPES[variant, scanned]
    assert {name: arrays[name].shape for name in shapes} == shapes


@pytest.mark.parametrize(
    ("variant", "scanned"),
    [(variant, True) for variant in SCANNED + BOTH] + [(variant, False) for variant in BOTH],
)
def test_maxtext_holds_every_number_of_the_text(
    variant: str, scanned: bool, tmp_path: Path
) -> None:
    arrays = maxtext(variant, tmp_path, scanned=scanned, zarr3=False)
    stored = sum(a.size for name, a in arrays.items() if name.startswith(("token", "decoder")))
    text = {n: a for n, a in golden(variant).items() if "vision" not in n and "multi" not in n}
    if variant == "qwen3_tied":  # which stores the head that it does not need
        del text["lm_head.weight"]
    assert stored == sum(a.size for a in text.values())


def test_llama_query_is_scaled_and_llama3p1_interleaved(tmp_path: Path) -> None:
    name = "decoder.layers.self_attention.query.kernel"
    q3 = hf("llama3", "model.layers.1.self_attn.q_proj.weight").reshape(8, 16, 64)
    halves = maxtext("llama3", tmp_path / "3", scanned=True)[name][:, 1]
    np.testing.assert_array_equal(halves[:, 5, 3] * 4, q3[5, 3])
    q31 = hf("llama3p1", "model.layers.1.self_attn.q_proj.weight").reshape(8, 16, 64)
    pairs = maxtext("llama3p1", tmp_path / "31", scanned=True)[name][:, 1]
    np.testing.assert_array_equal(pairs[:, 5, [0, 1, 2, 15]] * 4, q31[5, [0, 8, 1, 15]].T)


def test_gemma2_folds_and_pairs(tmp_path: Path) -> None:
    arrays = maxtext("gemma2_qscale", tmp_path / "new", scanned=True, vocab_rows=336)
    table = hf("gemma2_qscale", "model.embed_tokens.weight")
    embedding = arrays["token_embedder.embedding"]
    np.testing.assert_allclose(embedding[:320] / 48**0.5, table, rtol=2e-7)
    assert not embedding[320:].any()
    norm = hf("gemma2_qscale", "model.layers.3.pre_feedforward_layernorm.weight")
    stored = arrays["decoder.layers.pre_ffw_norm_global.scale"][:, 1]
    np.testing.assert_array_equal(stored, norm + 1)
    query = hf("gemma2_qscale", "model.layers.2.self_attn.q_proj.weight").reshape(4, 16, 48)
    name = "decoder.layers.self_attention_local.query.kernel"
    np.testing.assert_array_equal(arrays[name][:, 1, 3, 7] * 4, query[3, 7])
    old = maxtext(
        "gemma2_qscale", tmp_path / "old", scanned=True, old_27b_query=True, old_embedding=True
    )
    embedding = old["token_embedder.embedding"]
    np.testing.assert_array_equal(embedding / np.float32(6.9375), table)
    np.testing.assert_allclose(old[name][:, 1, 3, 7] * 24**0.5, query[3, 7], rtol=2e-7)


def test_gemma3_folds_and_blocks(tmp_path: Path) -> None:
    arrays = maxtext("gemma3_mm_27b", tmp_path / "new", scanned=True, vocab_rows=320)
    table = hf("gemma3_mm_27b", "model.language_model.embed_tokens.weight")[:320]
    np.testing.assert_array_equal(arrays["token_embedder.embedding"] / np.float32(6.9375), table)
    layer = "model.language_model.layers"
    k_norm = hf("gemma3_mm_27b", f"{layer}.5.self_attn.k_norm.weight")
    stored = arrays["decoder.layers.layers_5.self_attention.key_norm.scale"][:, 0]
    np.testing.assert_array_equal(stored, k_norm + 1)
    query = hf("gemma3_mm_27b", f"{layer}.7.self_attn.q_proj.weight")
    stored = arrays["decoder.layers_remainder.layers_1.self_attention.query.kernel"]
    np.testing.assert_array_equal(stored.reshape(48, 64), query.T)
    old = maxtext("gemma3_mm_27b", tmp_path / "old", scanned=True, old_gemma3=True)
    stack = old["decoder.layers.self_attention.query.kernel"]
    np.testing.assert_array_equal(stack[:, 7].reshape(48, 64), query.T)


def test_qwen_is_as_it_was(tmp_path: Path) -> None:
    arrays = maxtext("qwen2p5_untied", tmp_path / "2", scanned=True)
    bias = hf("qwen2p5_untied", "model.layers.1.self_attn.q_proj.bias")
    stored = arrays["decoder.layers.self_attention.query.bias"]
    np.testing.assert_array_equal(stored[:, 1].ravel(), bias)
    head = hf("qwen2p5_untied", "lm_head.weight")
    np.testing.assert_array_equal(arrays["decoder.logits_dense.kernel"], head.T)
    arrays = maxtext("qwen3_moe", tmp_path / "3", scanned=True)
    expert = hf("qwen3_moe", "model.layers.1.mlp.experts.6.down_proj.weight")
    np.testing.assert_array_equal(arrays["decoder.layers.moe_block.wo"][6, 1], expert.T)


def test_fused_arrays(tmp_path: Path) -> None:
    fused = maxtext("qwen2p5_tied", tmp_path / "2", scanned=True, fused_qkv=True, fused_mlp=True)
    kernel = fused["decoder.layers.self_attention.qkv_proj.kernel"]
    assert kernel.shape == (56, 2, 14 + 2 + 2, 4)
    value = hf("qwen2p5_tied", "model.layers.0.self_attn.v_proj.weight").reshape(2, 4, 56)
    np.testing.assert_array_equal(kernel[:, 0, 17, 2], value[1, 2])
    assert fused["decoder.layers.self_attention.qkv_proj.bias"].shape == (18, 2, 4)
    up = hf("qwen2p5_tied", "model.layers.1.mlp.up_proj.weight")
    np.testing.assert_array_equal(fused["decoder.layers.mlp.wi.kernel"][:, 1, 1], up.T)
    moe = maxtext("qwen3_moe", tmp_path / "3", scanned=False, prefuse_moe_weights=True)
    up = hf("qwen3_moe", "model.layers.0.mlp.experts.7.up_proj.weight")
    np.testing.assert_array_equal(moe["decoder.layers_0.moe_block.wi"][7, :, 24:], up.T)


@pytest.mark.parametrize(
    ("form", "given", "embedding"),
    [
        ("A", "0/items", "params.params.token_embedder.embedding"),
        ("B", "0/items", "token_embedder.embedding.value"),
        ("C", ".", "params.params.token_embedder.embedding"),
        ("D", ".", "params.params.token_embedder.embedding"),
        ("SFT", "0/model_params", "token_embedder.embedding.value"),
        ("RL", "0/model_params", "base.token_embedder.embedding.value"),
    ],
)
def test_forms(form: Any, given: str, embedding: str, tmp_path: Path) -> None:
    path = write_maxtext(GOLDEN / "llama3", tmp_path, scanned=False, form=form)
    assert path == tmp_path / given
    if form == "C":
        assert (path / "orbax.checkpoint").read_bytes() == b""
        path /= "items"
    assert embedding in restore(path)


def test_form_a_says_whether_it_is_scanned_and_may_hold_an_optimizer(tmp_path: Path) -> None:
    write_maxtext(GOLDEN / "llama3", tmp_path / "new", scanned=True)
    new = metadata(tmp_path / "new/0/_CHECKPOINT_METADATA")
    assert new["custom_metadata"] == {"scan_layers": True}
    path = write_maxtext(
        GOLDEN / "llama3", tmp_path / "old", scanned=True, metadata=False, trained=True
    )
    assert metadata(tmp_path / "old/0/_CHECKPOINT_METADATA")["custom_metadata"] == {}
    assert "opt_state.0.mu.params.token_embedder.embedding" in restore(path)


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_storage(ocdbt: bool, zarr3: bool, tmp_path: Path) -> None:
    path = write_maxtext(
        GOLDEN / "llama3_oddvocab", tmp_path, scanned=True, ocdbt=ocdbt, zarr3=zarr3, devices=8
    )
    said = metadata(path / "_METADATA")
    assert (said["use_ocdbt"], said["use_zarr3"]) == (ocdbt, zarr3)
    assert (path / "manifest.ocdbt").exists() == ocdbt
    shardings = [json.loads(each) for each in metadata(path / "_sharding").values()]
    specs = [each["partition_spec"] for each in shardings if each["shape"] == [8]]
    axis = "checkpoint_sharding_axis"
    assert {json.dumps(spec) for spec in specs} >= {json.dumps([axis]), json.dumps([None, axis])}
    name = "params.params.token_embedder.embedding"
    if not ocdbt:
        array = metadata(path / name / ("zarr.json" if zarr3 else ".zarray"))
        chunks = array["chunk_grid"]["configuration"]["chunk_shape"] if zarr3 else array["chunks"]
        assert chunks == [323, 8]
    table = hf("llama3_oddvocab", "model.embed_tokens.weight")
    np.testing.assert_array_equal(restore(path)[name], table)


def test_bfloat16_keeps_gemma_scales_in_float32_but_in_the_export(tmp_path: Path) -> None:
    folder, bfloat16 = GOLDEN / "gemma1_mqa", np.dtype("bfloat16")
    a = restore(write_maxtext(folder, tmp_path / "a", scanned=True, dtype="bfloat16"))
    assert a["params.params.decoder.decoder_norm.scale"].dtype == np.float32
    assert a["params.params.decoder.layers.mlp.wo.kernel"].dtype == bfloat16
    b = restore(write_maxtext(folder, tmp_path / "b", scanned=True, form="B", dtype="bfloat16"))
    assert {array.dtype for array in b.values()} == {bfloat16}


def test_flax_flat(tmp_path: Path) -> None:
    path = write_flax(GOLDEN / "gemma3_mm_4b", tmp_path, vocab_rows=320)
    assert (tmp_path / "tokenizer.model").exists()
    assert path == tmp_path / "gemma3_mm_4b"
    keys = metadata(path / "_METADATA")["tree_metadata"]
    assert "('transformer/layer_7/attn/_key_norm', 'scale')" in keys
    arrays = restore(path)
    layer = "transformer/layer_7/"
    shapes = {
        "transformer/embedder.input_embedding": (320, 48),
        "transformer/embedder/mm_input_projection.w": (24, 48),
        "SigLiPFromPatches_0/siglip_encoder/embedding.kernel": (14, 14, 3, 24),
        layer + "attn/q_einsum.w": (4, 48, 16),
        layer + "attn/kv_einsum.w": (2, 2, 48, 16),
        layer + "attn/attn_vec_einsum.w": (4, 16, 48),
        layer + "mlp/gating_einsum.w": (2, 96, 48),
        layer + "mlp/linear.w": (96, 48),
        layer + "post_ffw_norm.scale": (48,),
    }
    assert {name: arrays[name].shape for name in shapes} == shapes
    name = "language_model.model.layers.7."
    v = hf("gemma3_mm_4b", name + "self_attn.v_proj.weight").reshape(2, 16, 48)
    np.testing.assert_array_equal(arrays[layer + "attn/kv_einsum.w"][1, 1, :, 5], v[1, 5])
    up = hf("gemma3_mm_4b", name + "mlp.up_proj.weight")
    np.testing.assert_array_equal(arrays[layer + "mlp/gating_einsum.w"][1], up)


def test_flax_gemma1(tmp_path: Path) -> None:
    mha = restore(write_flax(GOLDEN / "gemma1_mha", tmp_path / "mha", vocab_rows=328, ocdbt=False))
    qkv = mha["transformer/layer_0/attn/qkv_einsum.w"]
    assert qkv.shape == (3, 4, 48, 16)
    k = hf("gemma1_mha", "model.layers.0.self_attn.k_proj.weight").reshape(4, 16, 48)
    np.testing.assert_array_equal(qkv[1, 2, :, 9], k[2, 9])
    assert not mha["transformer/embedder.input_embedding"][320:].any()
    norm = hf("gemma1_mha", "model.layers.0.post_attention_layernorm.weight")
    np.testing.assert_array_equal(mha["transformer/layer_0/pre_ffw_norm.scale"], norm)
    gate = hf("gemma1_mha", "model.layers.0.mlp.gate_proj.weight")
    np.testing.assert_array_equal(mha["transformer/layer_0/mlp/gating_einsum.w"][0], gate.T)
    nested = restore(write_flax(GOLDEN / "gemma1_mqa", tmp_path / "mqa", nested=True, gating="FD"))
    assert nested["layer_0.mlp.gating_einsum"].shape == (2, 96, 48)
    assert nested["layer_0.attn.kv_einsum.w"].shape == (2, 1, 48, 16)
    assert nested["embedder.input_embedding"].dtype == ml_dtypes.bfloat16
