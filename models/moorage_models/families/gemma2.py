"""Gemma 2.

Sources: the `config.json` of the google/gemma-2 repositories, and the Gemma 2 report for the
soft-caps and the alternation of local and global layers.
"""

from __future__ import annotations

from typing import Any

from moorage_models.config import ModelConfig
from moorage_models.families.family import BASE_TENSORS, POST_NORM_TENSORS, Family, Prefix

_SWITCHES: dict[str, Any] = {
    "family": "gemma2",
    "norm_offset": True,
    "post_norms": True,
    "activation": "gelu_tanh",
    "embed_scale": True,
}


def _preset(
    layers: int, width: int, hidden: int, heads: int, kv_heads: int, **more: Any
) -> ModelConfig:
    settings: dict[str, Any] = {
        "num_layers": layers,
        "vocab_size": 256_000,
        "embed_dim": width,
        "hidden_dim": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": 256,
        "query_scale": 256**-0.5,
        "tied": True,
        "attn_softcap": 50.0,
        "final_softcap": 30.0,
        "window": 4096,
        "pattern": "LG",
        "max_position": 8192,
    }
    return ModelConfig(**_SWITCHES, **{**settings, **more})


_2B = _preset(26, 2304, 9216, 8, 4)
_9B = _preset(42, 3584, 14_336, 16, 8)
_27B = _preset(46, 4608, 36_864, 32, 16, head_dim=128, query_scale=144**-0.5)

FAMILY = Family(
    name="gemma2",
    category="gemma",
    prefixes=(Prefix("gemma2", ("gemma-2-", "gemma2-")),),
    architectures={"Gemma2ForCausalLM": "gemma2", "Gemma2ForSequenceClassification": "gemma2"},
    switches=_SWITCHES,
    # transformers' Gemma2Config, whose alternation is a rule and not a key
    defaults={
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    presets={
        "gemma2_2b": _2B,
        "gemma2_2b_it": _2B,
        "gemma2_9b": _9B,
        "gemma2_9b_it": _9B,
        "gemma2_27b": _27B,
        "gemma2_27b_it": _27B,
    },
    tensors={**BASE_TENSORS, **POST_NORM_TENSORS},
)
