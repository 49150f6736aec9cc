"""Llama 3, 3.1 and 3.2, and every other checkpoint of the Llama architecture.

Sources: the `config.json` of the meta-llama repositories; rotary scaling as published with
Llama 3.1.
"""

from __future__ import annotations

from typing import Any

from moorage_models.config import ModelConfig, RopeScaling
from moorage_models.families.family import BASE_TENSORS, Family, Prefix

_SWITCHES: dict[str, Any] = {"family": "llama3"}
_LLAMA3P1 = RopeScaling("llama3", factor=8.0)
_LLAMA3P2 = RopeScaling("llama3", factor=32.0)


def _preset(layers: int, width: int, hidden: int, heads: int, **more: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "num_layers": layers,
        "vocab_size": 128_256,
        "embed_dim": width,
        "hidden_dim": hidden,
        "num_heads": heads,
        "num_kv_heads": 8,
        "head_dim": 128,
        "norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "max_position": 131_072 if "rope_scaling" in more else 8192,
    }
    return ModelConfig(**_SWITCHES, **{**settings, **more})


_BASE = {
    "llama3_8b": _preset(32, 4096, 14336, 32),
    "llama3_70b": _preset(80, 8192, 28672, 64),
    "llama3p1_8b": _preset(32, 4096, 14336, 32, rope_scaling=_LLAMA3P1),
    "llama3p1_70b": _preset(80, 8192, 28672, 64, rope_scaling=_LLAMA3P1),
    "llama3p1_405b": _preset(126, 16384, 53248, 128, rope_scaling=_LLAMA3P1),
    "llama3p2_1b": _preset(16, 2048, 8192, 32, head_dim=64, rope_scaling=_LLAMA3P2, tied=True),
    "llama3p2_3b": _preset(28, 3072, 8192, 24, rope_scaling=_LLAMA3P2, tied=True),
}

FAMILY = Family(
    name="llama3",
    category="llama3",
    prefixes=(
        Prefix("llama3", ("llama-3-", "llama3-")),
        Prefix("llama3p1", ("llama-3.1-", "llama3.1-")),
        Prefix("llama3p2", ("llama-3.2-", "llama3.2-")),
    ),
    architectures={"LlamaForCausalLM": "llama", "LlamaForSequenceClassification": "llama"},
    switches=_SWITCHES,
    # transformers' LlamaConfig
    defaults={
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    presets={**_BASE, **{f"{name}_instruct": config for name, config in _BASE.items()}},
    tensors=BASE_TENSORS,
)
