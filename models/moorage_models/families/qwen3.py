"""Qwen3, dense and mixture of experts.

Sources: the `config.json` of the Qwen/Qwen3 repositories.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moorage_models.config import ModelConfig
from moorage_models.families.family import (
    BASE_TENSORS,
    EXPERT_TENSORS,
    FUSED_EXPERT_TENSORS,
    QK_NORM_TENSORS,
    Family,
    Prefix,
)

_SWITCHES: dict[str, Any] = {"family": "qwen3", "qk_norm": True}


def _preset(layers: int, width: int, hidden: int, heads: int, **more: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "num_layers": layers,
        "vocab_size": 151_936,
        "embed_dim": width,
        "hidden_dim": hidden,
        "num_heads": heads,
        "num_kv_heads": 8,
        "head_dim": 128,
        "rope_theta": 1_000_000.0,
        "max_position": 40_960,
    }
    return ModelConfig(**_SWITCHES, **{**settings, **more})


_0P6B = _preset(28, 1024, 3072, 16, tied=True)
_1P7B = _preset(28, 2048, 6144, 16, tied=True)
_4B = _preset(36, 2560, 9728, 32, tied=True)
_8B = _preset(36, 4096, 12_288, 32)
_14B = _preset(40, 5120, 17_408, 40)
_32B = _preset(64, 5120, 25_600, 64)

# Every layer is sparse; the published intermediate_size, 6144, sizes no weight.
_EXPERTS: dict[str, Any] = {
    "num_experts": 128,
    "experts_per_token": 8,
    "expert_hidden_dim": 768,
    "norm_topk": True,
}
_30B_A3B = _preset(48, 2048, 6144, 32, num_kv_heads=4, **_EXPERTS)

_BASE: dict[str, Any] = {"max_position": 32_768}
_4B_2507: dict[str, Any] = {"rope_theta": 5_000_000.0, "max_position": 262_144}
_30B_2507: dict[str, Any] = {"rope_theta": 10_000_000.0, "max_position": 262_144}

FAMILY = Family(
    name="qwen3",
    category="qwen3",
    prefixes=(Prefix("qwen3", ("qwen3-",)),),
    architectures={
        "Qwen3ForCausalLM": "qwen3",
        "Qwen3MoeForCausalLM": "qwen3_moe",
        "Qwen3ForSequenceClassification": "qwen3",
        "Qwen3MoeForSequenceClassification": "qwen3_moe",
    },
    switches=_SWITCHES,
    # transformers' Qwen3Config
    defaults={
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    # transformers' Qwen3MoeConfig
    architecture_defaults={
        name: {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "head_dim": None,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        }
        for name in ("Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification")
    },
    presets={
        "qwen3_0p6b": _0P6B,
        "qwen3_0p6b_base": replace(_0P6B, **_BASE),
        "qwen3_1p7b": _1P7B,
        "qwen3_1p7b_base": replace(_1P7B, **_BASE),
        "qwen3_4b": _4B,
        "qwen3_4b_base": replace(_4B, **_BASE),
        "qwen3_4b_instruct_2507": replace(_4B, **_4B_2507),
        "qwen3_4b_thinking_2507": replace(_4B, **_4B_2507),
        "qwen3_8b": _8B,
        "qwen3_8b_base": replace(_8B, **_BASE),
        "qwen3_14b": _14B,
        "qwen3_14b_base": replace(_14B, **_BASE),
        "qwen3_32b": _32B,
        "qwen3_30b_a3b": _30B_A3B,
        "qwen3_30b_a3b_base": replace(_30B_A3B, **_BASE),
        "qwen3_30b_a3b_instruct_2507": replace(_30B_A3B, **_30B_2507),
        "qwen3_30b_a3b_thinking_2507": replace(_30B_A3B, **_30B_2507),
    },
    tensors={**BASE_TENSORS, **QK_NORM_TENSORS, **EXPERT_TENSORS},
    fused=FUSED_EXPERT_TENSORS,
)
