"""Gemma 3: the text decoder, of the text-only and of the multimodal releases.

Sources: the `config.json` of the google/gemma-3 repositories, and the Gemma 3 report for the
pattern, the windows and the two rotary bases.
"""

from __future__ import annotations

from typing import Any

from moorage_models.config import ModelConfig, RopeScaling
from moorage_models.families.family import (
    BASE_TENSORS,
    POST_NORM_TENSORS,
    QK_NORM_TENSORS,
    Family,
    Prefix,
)

_SWITCHES: dict[str, Any] = {
    "family": "gemma3",
    "norm_offset": True,
    "post_norms": True,
    "qk_norm": True,
    "activation": "gelu_tanh",
    "embed_scale": True,
}


def _preset(
    layers: int, width: int, hidden: int, heads: int, kv_heads: int, **more: Any
) -> ModelConfig:
    settings: dict[str, Any] = {
        "num_layers": layers,
        "vocab_size": 262_144,
        "embed_dim": width,
        "hidden_dim": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": 256,
        "query_scale": 256**-0.5,
        "tied": True,
        "window": 512,
        "pattern": "LLLLLG",
        "rope_theta": 1_000_000.0,
        "rope_local_theta": 10_000.0,
        "max_position": 32_768,
    }
    return ModelConfig(**_SWITCHES, **{**settings, **more})


# 4B and up are multimodal: 64 padding rows in the table, positions divided by 8.
_MULTIMODAL: dict[str, Any] = {
    "vocab_size": 262_208,
    "window": 1024,
    "rope_scaling": RopeScaling("linear", factor=8.0),
    "max_position": 131_072,
}

_270M = _preset(18, 640, 2048, 4, 1)
_1B = _preset(26, 1152, 6912, 4, 1)
_4B = _preset(34, 2560, 10_240, 8, 4, **_MULTIMODAL)
_12B = _preset(48, 3840, 15_360, 16, 8, **_MULTIMODAL)
_27B = _preset(62, 5376, 21_504, 32, 16, head_dim=128, query_scale=168**-0.5, **_MULTIMODAL)

FAMILY = Family(
    name="gemma3",
    category="gemma3",
    prefixes=(Prefix("gemma3", ("gemma-3-", "gemma3-")),),
    architectures={
        "Gemma3ForCausalLM": "gemma3_text",
        "Gemma3ForConditionalGeneration": "gemma3",
        "Gemma3TextForSequenceClassification": "gemma3_text",
        "Gemma3ForSequenceClassification": "gemma3",
    },
    switches=_SWITCHES,
    # transformers' Gemma3TextConfig; the multimodal releases' config.json leans on them
    defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    presets={
        "gemma3_270m": _270M,
        "gemma3_270m_it": _270M,
        "gemma3_1b_pt": _1B,
        "gemma3_1b_it": _1B,
        "gemma3_4b_pt": _4B,
        "gemma3_4b_it": _4B,
        "gemma3_12b_pt": _12B,
        "gemma3_12b_it": _12B,
        "gemma3_27b_pt": _27B,
        "gemma3_27b_it": _27B,
    },
    tensors={**BASE_TENSORS, **POST_NORM_TENSORS, **QK_NORM_TENSORS},
    renames={"model.language_model.": "model.", "language_model.": ""},
    ignorable=(
        ".rotary_emb.inv_freq",
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)
