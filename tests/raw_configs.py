"""Small `config.json` files of every family, for tests to vary."""

from __future__ import annotations

from typing import Any

Raw = dict[str, Any]

LLAMA: Raw = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "hidden_act": "silu",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
GEMMA: Raw = {
    "architectures": ["GemmaForCausalLM"],
    **{k: v for k, v in LLAMA.items() if k.startswith(("num", "vocab", "hidden_s", "inter"))},
    "head_dim": 16,
}
GEMMA2 = GEMMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
}
GEMMA3 = GEMMA2 | {"architectures": ["Gemma3ForCausalLM"]}
LLAMA3_ROPE: Raw = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR: Raw = {"rope_type": "linear", "factor": 8.0}
SLIDING, FULL = "sliding_attention", "full_attention"


def without(raw: Raw, *keys: str) -> Raw:
    return {key: value for key, value in raw.items() if key not in keys}
