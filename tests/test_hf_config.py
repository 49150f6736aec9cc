"""`config.json` in the spellings of transformers 4 and 5, with what it leaves out."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from checkpoints import GOLDEN, VARIANTS, golden_config, open_folder
from moorage_models.checkpoint import open_checkpoint
from moorage_models.config import ModelConfig, RopeScaling
from moorage_models.families import PRESETS
from moorage_models.hf_config import read_config
from moorage_models.sources import ModelRequest, ModelSource
from raw_configs import (
    FULL,
    GEMMA,
    GEMMA2,
    GEMMA3,
    LINEAR,
    LLAMA,
    LLAMA3_ROPE,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SLIDING,
    Raw,
    without,
)


def test_the_numbers_of_a_plain_config() -> None:
    assert read_config(LLAMA) == ModelConfig(
        family="llama3",
        num_layers=3,
        vocab_size=320,
        embed_dim=64,
        hidden_dim=96,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,  # 64 / 8
        norm_eps=1e-5,
        query_scale=8**-0.5,
        rope_theta=500_000.0,
        max_position=128,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_golden_config_parses_to_its_numbers(name: str) -> None:
    raw = golden_config(name)
    text: Raw = raw.get("text_config", raw)  # type: ignore[assignment]
    config = open_folder(GOLDEN / name).config
    heads = text["num_attention_heads"]
    assert {
        "num_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "embed_dim": config.embed_dim,
        "hidden_dim": config.hidden_dim,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position": config.max_position,
        "softcaps": (config.attn_softcap, config.final_softcap),
        "window": config.window,
        "query_scale": config.query_scale,
        "experts": (config.num_experts, config.experts_per_token, config.expert_hidden_dim),
        "num_labels": config.num_labels,
    } == {
        "num_layers": text["num_hidden_layers"],
        "vocab_size": text["vocab_size"],
        "embed_dim": text["hidden_size"],
        "hidden_dim": text["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": text["num_key_value_heads"],
        "head_dim": text.get("head_dim", text["hidden_size"] // heads),
        "norm_eps": text["rms_norm_eps"],
        "rope_theta": text["rope_theta"],
        "max_position": text["max_position_embeddings"],
        "softcaps": (
            text.get("attn_logit_softcapping"),
            text.get("final_logit_softcapping"),
        ),
        "window": text.get("sliding_window") if "gemma" in name else None,
        "query_scale": pytest.approx(
            1 / math.sqrt(text.get("query_pre_attn_scalar", config.head_dim))
        ),
        "experts": tuple(
            text.get(key, 0)
            for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        ),
        "num_labels": len(text.get("id2label", ())),
    }
    kinds = {SLIDING: "L", FULL: "G"}
    layers = text.get("layer_types", [FULL] * config.num_layers)
    assert config.layer_kinds == "".join(kinds[layer] for layer in layers)


# the same rotary settings as transformers 4 and as transformers 5 write them
ROPES: dict[str, tuple[Raw, Raw, Raw, Raw]] = {
    "plain": (
        LLAMA,
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5},
    ),
    "llama3": (
        LLAMA,
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}},
        {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32)},
    ),
    "linear, in its older spelling": (
        LLAMA,
        {"rope_theta": 7e5, "rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_parameters": {"rope_theta": 7e5, **LINEAR}},
        {"rope_theta": 7e5, "rope_scaling": RopeScaling("linear", 8.0)},
    ),
    "two bases": (
        GEMMA3,
        {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},
        {
            "rope_parameters": {
                FULL: {"rope_theta": 2e6, **LINEAR},
                SLIDING: {"rope_theta": 2e4, "rope_type": "default"},
            }
        },
        {
            "rope_theta": 2e6,
            "rope_local_theta": 2e4,
            "rope_scaling": RopeScaling("linear", 8.0),
            "rope_local_scaling": None,
        },
    ),
}


@pytest.mark.parametrize(("base", "old", "new", "wanted"), ROPES.values(), ids=ROPES)
def test_rotary_settings_in_both_spellings(base: Raw, old: Raw, new: Raw, wanted: Raw) -> None:
    bare = without(base, "rope_theta")
    config = read_config(bare | old)
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert read_config(bare | new) == config


def test_a_local_rotary_scaling_is_kept_apart() -> None:
    given = {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4, **LINEAR}}
    config = read_config(GEMMA3 | {"rope_parameters": given})
    assert config.rope_scaling is None
    assert config.rope_local_scaling == RopeScaling("linear", 8.0)


@pytest.mark.parametrize(
    ("more", "kinds"),
    [
        ({}, "LLLLLGLL"),
        ({"sliding_window_pattern": 3}, "LLGLLGLL"),
        ({"_sliding_window_pattern": 4, "sliding_window_pattern": None}, "LLLGLLLG"),
        ({"sliding_window_pattern": 3, "layer_types": [FULL] + [SLIDING] * 7}, "GLLLLLLL"),
        ({"layer_types": [FULL] * 8}, "GGGGGGGG"),
        ({"sliding_window_pattern": 1}, "GGGGGGGG"),
        ({"sliding_window_pattern": 9}, "LLLLLLLL"),
    ],
)
def test_the_pattern_of_gemma_3_layers(more: Raw, kinds: str) -> None:
    config = read_config(GEMMA3 | {"num_hidden_layers": 8} | more)
    assert config.layer_kinds == kinds
    assert config.window == (8 if "L" in kinds else None)


def test_gemma_2_alternates_without_saying_so() -> None:
    assert read_config(GEMMA2 | {"num_hidden_layers": 5}).layer_kinds == "LGLGL"


@pytest.mark.parametrize("base", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_a_window_that_is_switched_off_is_no_window(base: Raw) -> None:
    unused = {"use_sliding_window": False, "sliding_window": 16, "layer_types": [FULL] * 3}
    config = read_config(base | unused)
    assert config.window is None
    assert config.layer_kinds == "GGG"


def test_the_abbreviated_multimodal_config_is_the_published_model() -> None:
    """google/gemma-3-4b-it leaves to the defaults what the preset states."""
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    config = read_config(published)
    assert config.differences(PRESETS["gemma3_4b_it"]) == []
    assert (config.vocab_size, config.num_heads, config.num_kv_heads) == (262_208, 8, 4)
    assert config.tied


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (GEMMA, {"tied": True, "norm_eps": 1e-6, "rope_theta": 10_000.0, "norm_offset": True}),
        (GEMMA2, {"attn_softcap": 50.0, "final_softcap": 30.0, "post_norms": True}),
        (GEMMA3, {"rope_theta": 1e6, "rope_local_theta": 1e4, "qk_norm": True}),
        (QWEN2, {"tied": False, "qkv_bias": True, "qk_norm": False, "head_dim": 8}),
        (QWEN2 | {"tie_word_embeddings": True}, {"tied": True}),
        (QWEN2 | {"head_dim": None}, {"head_dim": 8}),
        (without(LLAMA, "num_key_value_heads"), {"num_kv_heads": 8}),
        (without(LLAMA, "rms_norm_eps", "rope_theta"), {"norm_eps": 1e-6, "rope_theta": 1e4}),
        (without(QWEN3, "head_dim"), {"head_dim": 128, "qk_norm": True, "qkv_bias": False}),
        (QWEN3_MOE, {"num_experts": 8, "experts_per_token": 3, "expert_hidden_dim": 24}),
        (without(QWEN3_MOE, "norm_topk_prob"), {"norm_topk": False}),
        (
            without(QWEN3_MOE, "num_experts") | {"num_local_experts": 8},
            {"num_experts": 8, "norm_topk": True},
        ),
        (GEMMA | {"hidden_act": "gelu", "hidden_activation": None}, {"activation": "gelu_tanh"}),
        (LLAMA | {"attention_bias": None, "mlp_bias": False}, {"qkv_bias": False}),
    ],
    ids=str,
)
def test_what_is_left_out_has_its_familys_default(raw: Raw, wanted: Raw) -> None:
    config = read_config(raw)
    assert {key: getattr(config, key) for key in wanted} == wanted


@pytest.mark.parametrize(("labels", "count"), [({"0": "good"}, 1), (None, 2)])
def test_a_reward_model_has_as_many_outputs_as_labels(labels: Raw | None, count: int) -> None:
    """transformers writes `id2label` unless there are two labels, its default."""
    raw = GEMMA | {"architectures": ["GemmaForSequenceClassification"]}
    config = read_config(raw | ({"id2label": labels} if labels else {}))
    assert config.num_labels == count
    assert not config.tied  # unlike Gemma's language models


def test_every_architecture_is_known() -> None:
    families = {
        "GemmaForCausalLM": "gemma",
        "Gemma2ForCausalLM": "gemma2",
        "Gemma3ForCausalLM": "gemma3",
        "Gemma3ForConditionalGeneration": "gemma3",
        "LlamaForCausalLM": "llama3",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
        "Qwen3MoeForCausalLM": "qwen3",
        "LlamaForSequenceClassification": "llama3",
        "Gemma3TextForSequenceClassification": "gemma3",
    }
    for architecture, family in families.items():
        assert read_config({"architectures": [architecture]}).family == family


def open_as(model_id: str, raw: Raw, tmp_path: Any) -> tuple[str, ...]:
    folder = tmp_path / "model"
    folder.mkdir()
    source = GOLDEN / "llama3"
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(raw))
    request = ModelRequest(model_id, ModelSource.INTERNAL, str(folder))
    return open_checkpoint(request).preset_differences


def test_a_config_is_cross_checked_with_the_preset_of_its_id(tmp_path: Any) -> None:
    told = open_as("llama3_8b", golden_config("llama3"), tmp_path)
    assert "num_layers: 2, 32" in told
    assert "vocab_size: 320, 128256" in told
    assert not any(line.startswith(("rope_theta", "norm_eps", "tied")) for line in told)


def test_an_id_without_a_preset_is_not_cross_checked(tmp_path: Any) -> None:
    assert open_as("my-org/run-7", golden_config("llama3"), tmp_path) == ()


def test_differences_are_those_that_change_numbers() -> None:
    config = read_config(GEMMA3)
    same = read_config(GEMMA3 | {"max_position_embeddings": 7, "layer_types": [SLIDING] * 3})
    assert config.differences(same) == []
    other = read_config(GEMMA3 | {"rope_local_base_freq": 2e4, "sliding_window": 9})
    assert config.differences(other) == ["window: 8, 9", "rope_local_theta: 10000.0, 20000.0"]
