"""Gemma 1 and 1.1.

Sources: the `config.json` of the google/gemma and google/gemma-1.1 repositories.
"""

from __future__ import annotations

from typing import Any

from moorage_models.config import ModelConfig
from moorage_models.families.family import BASE_TENSORS, Family, Prefix

_SWITCHES: dict[str, Any] = {
    "family": "gemma",
    "norm_offset": True,
    "activation": "gelu_tanh",
    "embed_scale": True,
}


def _preset(layers: int, width: int, hidden: int, heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        vocab_size=256_000,
        embed_dim=width,
        hidden_dim=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=256,
        tied=True,
        max_position=8192,
        **_SWITCHES,
    )


_2B = _preset(18, 2048, 16_384, 8, 1)
_7B = _preset(28, 3072, 24_576, 16, 16)

FAMILY = Family(
    name="gemma",
    category="gemma",
    prefixes=(
        Prefix("gemma", ("gemma-",)),
        Prefix("gemma1p1", ("gemma-1.1-", "gemma1.1-")),
    ),
    architectures={"GemmaForCausalLM": "gemma", "GemmaForSequenceClassification": "gemma"},
    switches=_SWITCHES,
    # transformers' GemmaConfig, but for hidden_activation: the first releases say
    # hidden_act = "gelu" without it, and mean the tanh approximation that they were trained with
    defaults={
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    presets={
        "gemma_2b": _2B,
        "gemma_2b_it": _2B,
        "gemma_7b": _7B,
        "gemma_7b_it": _7B,
        "gemma1p1_2b_it": _2B,
        "gemma1p1_7b_it": _7B,
    },
    # the pre-MLP norm is the checkpoint's post_attention_layernorm, as in Llama
    tensors=BASE_TENSORS,
)
