"""The golden variants: one small model for each way in which the families differ.

Settings that a table leaves out are the defaults of transformers' configuration class.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf

VOCAB = 320

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GEMMA = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 1}
GEMMA2 = {
    **GEMMA,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}
GEMMA3 = {
    **GEMMA,
    "num_hidden_layers": 8,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
LLAMA = {
    **COMMON,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN2 = {
    **{key: value for key, value in COMMON.items() if key != "head_dim"},
    "hidden_size": 56,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
}
QWEN3 = {
    **COMMON,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
QWEN3_MOE = {
    **QWEN3,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
UNUSED_WINDOW = {"sliding_window": 16, "max_window_layers": 1}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
REWARD = {"num_labels": 1}


def multimodal(**text: Any) -> dict[str, Any]:
    stretched = {"rope_type": "linear", "factor": 8.0}
    return {
        "text_config": {**GEMMA3, "num_key_value_heads": 2, "rope_scaling": stretched}
        | {"vocab_size": VOCAB + 8, **text},
        "vision_config": {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "boi_token_index": VOCAB - 2,
        "eoi_token_index": VOCAB - 1,
        "image_token_index": VOCAB,
        "eos_token_id": [1, 106],
    }


@dataclass(frozen=True)
class Variant:
    """One checkpoint.

    Attributes:
        model: The class that is stored and run.
        settings: Arguments of its configuration class.
        dtype: What the tensors are stored in.
        float32: Tensors with this in their name are stored in float32 instead.
        shard: The largest size of one safetensors file.
        tied_head_too: The head is stored although it is the embedding table.
        newer_names: Multimodal tensors are stored under `model.language_model.`, as transformers
            5 does, instead of `language_model.model.`.
        more_config: Written into `config.json` although transformers would drop it, because the
            published files have it.
    """

    model: type[hf.PreTrainedModel]
    settings: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    float32: str | None = None
    shard: str = "1GB"
    tied_head_too: bool = False
    newer_names: bool = False
    more_config: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "gemma1_mqa": Variant(hf.GemmaForCausalLM, GEMMA),
    "gemma1_mha": Variant(hf.GemmaForCausalLM, GEMMA | {"num_key_value_heads": 4}),
    "gemma1_reward": Variant(hf.GemmaForSequenceClassification, GEMMA | REWARD),
    "gemma2": Variant(hf.Gemma2ForCausalLM, GEMMA2),
    # as in 27B: the query scale is not that of the head
    "gemma2_qscale": Variant(hf.Gemma2ForCausalLM, GEMMA2 | {"query_pre_attn_scalar": 24}),
    "gemma2_reward": Variant(hf.Gemma2ForSequenceClassification, GEMMA2 | REWARD),
    "gemma3_text_mqa": Variant(hf.Gemma3ForCausalLM, GEMMA3),
    # as 4B and 12B: beside a vision tower, with positions divided by 8 in global layers
    "gemma3_mm_4b": Variant(hf.Gemma3ForConditionalGeneration, multimodal()),
    # as 27B: also a query scale that is not that of the head
    "gemma3_mm_27b": Variant(
        hf.Gemma3ForConditionalGeneration,
        multimodal(query_pre_attn_scalar=12),
        shard="60KB",
        newer_names=True,
    ),
    "gemma3_reward": Variant(hf.Gemma3TextForSequenceClassification, GEMMA3 | REWARD),
    "llama3": Variant(hf.LlamaForCausalLM, LLAMA | UNTIED),
    "llama3p1": Variant(hf.LlamaForCausalLM, LLAMA | UNTIED | {"rope_scaling": LLAMA31_ROPE}),
    "llama3p2": Variant(
        hf.LlamaForCausalLM, LLAMA | TIED | {"rope_scaling": LLAMA31_ROPE | {"factor": 32.0}}
    ),
    # widths that no even mesh divides
    "llama3_oddvocab": Variant(
        hf.LlamaForCausalLM,
        LLAMA
        | TIED
        | {"vocab_size": 323, "intermediate_size": 93}
        | {"num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "llama3_mixed_dtype": Variant(hf.LlamaForCausalLM, LLAMA | UNTIED, float32="norm"),
    "llama3_reward": Variant(hf.LlamaForSequenceClassification, LLAMA | REWARD),
    "qwen2p5_tied": Variant(hf.Qwen2ForCausalLM, QWEN2 | TIED, more_config=UNUSED_WINDOW),
    "qwen2p5_untied": Variant(
        hf.Qwen2ForCausalLM,
        QWEN2
        | UNTIED
        | {"vocab_size": VOCAB + 32, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    "qwen2p5_reward": Variant(hf.Qwen2ForSequenceClassification, QWEN2 | REWARD),
    "qwen3_tied": Variant(hf.Qwen3ForCausalLM, QWEN3 | TIED, tied_head_too=True),
    "qwen3_untied": Variant(hf.Qwen3ForCausalLM, QWEN3 | UNTIED),
    "qwen3_theta5e6": Variant(hf.Qwen3ForCausalLM, QWEN3 | TIED | {"rope_theta": 5e6}),
    "qwen3_f16": Variant(hf.Qwen3ForCausalLM, QWEN3 | TIED, dtype=torch.float16),
    "qwen3_f32": Variant(hf.Qwen3ForCausalLM, QWEN3 | UNTIED, dtype=torch.float32),
    "qwen3_moe": Variant(hf.Qwen3MoeForCausalLM, QWEN3_MOE | UNTIED, shard="40KB"),
    "qwen3_moe_rawtopk": Variant(
        hf.Qwen3MoeForCausalLM, QWEN3_MOE | UNTIED | {"norm_topk_prob": False}
    ),
    "qwen3_reward": Variant(hf.Qwen3ForSequenceClassification, QWEN3 | REWARD),
}
