"""Qwen2.5, its coder and mathematics releases, and DeepSeek-R1's distillations into them.

Sources: the `config.json` of the Qwen/Qwen2.5 and deepseek-ai/DeepSeek-R1-Distill-Qwen
repositories.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moorage_models.config import ModelConfig
from moorage_models.families.family import BASE_TENSORS, QKV_BIAS_TENSORS, Family, Prefix

_SWITCHES: dict[str, Any] = {"family": "qwen2", "qkv_bias": True}


def _preset(
    layers: int, width: int, hidden: int, heads: int, kv_heads: int, **more: Any
) -> ModelConfig:
    settings: dict[str, Any] = {
        "num_layers": layers,
        "vocab_size": 151_936,
        "embed_dim": width,
        "hidden_dim": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": 128,
        "rope_theta": 1_000_000.0,
        "max_position": 32_768,
    }
    return ModelConfig(**_SWITCHES, **{**settings, **more})


_0P5B = _preset(24, 896, 4864, 14, 2, head_dim=64, tied=True)
_1P5B = _preset(28, 1536, 8960, 12, 2, tied=True)
_3B = _preset(36, 2048, 11_008, 16, 2, tied=True)
_7B = _preset(28, 3584, 18_944, 28, 4, vocab_size=152_064)
_14B = _preset(48, 5120, 13_824, 40, 8, vocab_size=152_064)
_32B = _preset(64, 5120, 27_648, 40, 8, vocab_size=152_064)

_LONG: dict[str, Any] = {"max_position": 131_072}
_LARGE_BASE: dict[str, Any] = {"norm_eps": 1e-5, **_LONG}  # the instruct releases have 1e-6
_MATH: dict[str, Any] = {"rope_theta": 10_000.0, "max_position": 4096}
_DISTILL: dict[str, Any] = {"rope_theta": 10_000.0, "tied": False, **_LONG}

FAMILY = Family(
    name="qwen2",
    category="qwen2",
    prefixes=(
        Prefix("qwen2p5", ("qwen2.5-",)),
        Prefix("deepseek_r1_distill_qwen", ("deepseek-r1-distill-qwen-",)),
    ),
    architectures={"Qwen2ForCausalLM": "qwen2", "Qwen2ForSequenceClassification": "qwen2"},
    switches=_SWITCHES,
    # transformers' Qwen2Config
    defaults={
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    presets={
        "qwen2p5_0p5b": _0P5B,
        "qwen2p5_0p5b_instruct": _0P5B,
        "qwen2p5_1p5b": replace(_1P5B, **_LONG),
        "qwen2p5_1p5b_instruct": _1P5B,
        "qwen2p5_3b": _3B,
        "qwen2p5_3b_instruct": _3B,
        "qwen2p5_7b": replace(_7B, **_LONG),
        "qwen2p5_7b_instruct": _7B,
        "qwen2p5_14b": replace(_14B, **_LARGE_BASE),
        "qwen2p5_14b_instruct": _14B,
        "qwen2p5_32b": replace(_32B, **_LARGE_BASE),
        "qwen2p5_32b_instruct": _32B,
        "qwen2p5_coder_0p5b": _0P5B,
        "qwen2p5_coder_3b": _3B,
        "qwen2p5_coder_7b": _7B,
        "qwen2p5_math_1p5b": replace(_1P5B, **_MATH),
        "qwen2p5_math_7b": replace(_7B, **_MATH),
        "deepseek_r1_distill_qwen_1p5b": replace(_1P5B, **_DISTILL),
        "deepseek_r1_distill_qwen_7b": replace(_7B, **_DISTILL),
    },
    tensors={**BASE_TENSORS, **QKV_BIAS_TENSORS},
)
