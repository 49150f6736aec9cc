"""`config.json`: what cannot be run exactly is refused, and what is damaged is told apart."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorage_models.errors import ModelError, Reason
from moorage_models.families import FAMILIES
from moorage_models.hf_config import read_config
from raw_configs import (
    FULL,
    GEMMA2,
    GEMMA3,
    LINEAR,
    LLAMA,
    LLAMA3_ROPE,
    QWEN2,
    QWEN3_MOE,
    SLIDING,
    Raw,
)


def refusal(raw: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_config(raw)
    return caught.value


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": GEMMA3}
            | {"quantization_config": {"quant_method": "bitsandbytes"}},
            "bitsandbytes",
        ),
        (LLAMA | {"attention_bias": True}, "attention_bias = True"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias = True"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window = True"),
        (QWEN2 | {"layer_types": [FULL, SLIDING, FULL], "sliding_window": 8}, "sliding windows"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (GEMMA3 | {"layer_types": [FULL, "chunked_attention", FULL]}, "chunked_attention"),
        (GEMMA3 | {"layer_types": [FULL]}, "for 3 layers"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary type 'yarn'"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rotary type 'dynamic'"),
        (LLAMA | {"rope_parameters": {"rope_type": "longrope"}}, "rotary type 'longrope'"),
        (
            GEMMA3 | {"rope_parameters": {FULL: {}, SLIDING: {"rope_type": "proportional"}}},
            "rotary type 'proportional'",
        ),
        (LLAMA | {"hidden_act": "gelu"}, "activation 'gelu'"),
        (
            LLAMA | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        (GEMMA2 | {"hidden_activation": "gelu"}, "activation 'gelu'"),
        (
            LLAMA | {"architectures": ["MixtralForCausalLM"]},
            "MixtralForCausalLM; .*LlamaForCausalLM",
        ),
        ({"architectures": ["Gemma3nForConditionalGeneration"]}, "Gemma3nForConditionalGeneration"),
        ({"architectures": []}, "architecture none"),
        ({}, "architecture none"),
    ],
    ids=str,
)
def test_what_cannot_be_run_exactly_is_refused(raw: Raw, what: str) -> None:
    error = refusal(raw)
    assert error.reason is Reason.CHECKPOINT_UNSUPPORTED
    assert re.search(what, error.details["what"])
    assert error.details["what"] in error.message


def test_one_refusal_names_everything() -> None:
    raw = LLAMA | {"attention_bias": True, "hidden_act": "relu", "rope_scaling": {"type": "yarn"}}
    message = refusal(raw).message
    assert all(part in message for part in ("attention_bias", "activation 'relu'", "'yarn'"))


DAMAGED: list[tuple[Raw, str]] = [
    (LLAMA | {"num_hidden_layers": "3"}, "num_hidden_layers"),
    (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers"),
    (LLAMA | {"num_hidden_layers": 10**12}, "num_hidden_layers"),
    (GEMMA3 | {"num_hidden_layers": 10**12}, "num_hidden_layers"),
    (GEMMA3 | {"sliding_window_pattern": 10**12}, ""),
    (LLAMA | {"vocab_size": "320"}, "vocab_size"),
    (LLAMA | {"vocab_size": 320.5}, "vocab_size"),
    (LLAMA | {"vocab_size": True}, "vocab_size"),
    (LLAMA | {"hidden_size": None}, ""),
    (LLAMA | {"head_dim": -16}, "head_dim"),
    (LLAMA | {"head_dim": 15}, "head_dim"),
    (LLAMA | {"num_attention_heads": 0}, ""),
    (LLAMA | {"num_attention_heads": [8]}, ""),
    (LLAMA | {"num_attention_heads": 128, "num_key_value_heads": 128}, ""),  # no head_dim
    (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads"),
    (LLAMA | {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    (LLAMA | {"rms_norm_eps": -1.0}, "rms_norm_eps"),
    (LLAMA | {"rms_norm_eps": math.nan}, "rms_norm_eps"),
    (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    (LLAMA | {"rope_theta": "ten"}, ""),
    (LLAMA | {"rope_theta": 0}, "rope_theta"),
    (LLAMA | {"rope_theta": 10**400}, ""),
    (LLAMA | {"rope_scaling": ["llama3"]}, ""),
    (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    (LLAMA | {"rope_scaling": LINEAR | {"factor": 0}}, "factor"),
    (LLAMA | {"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor"),
    (LLAMA | {"rope_scaling": {"rope_type": ["llama3"]}}, ""),
    (LLAMA | {"rope_parameters": 5}, ""),
    (GEMMA2 | {"query_pre_attn_scalar": -16}, "query_pre_attn_scalar"),
    (GEMMA2 | {"query_pre_attn_scalar": 0}, ""),
    (GEMMA2 | {"sliding_window": None}, "sliding_window"),
    (GEMMA2 | {"sliding_window": -8}, "sliding_window"),
    (GEMMA2 | {"final_logit_softcapping": "30"}, "final_logit_softcapping"),
    (GEMMA2 | {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
    (GEMMA3 | {"layer_types": 3}, ""),
    (GEMMA3 | {"sliding_window_pattern": "6"}, ""),
    (QWEN3_MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    (QWEN3_MOE | {"num_experts": -8}, "num_experts"),
    (QWEN3_MOE | {"moe_intermediate_size": None}, "moe_intermediate_size"),
    ({"architectures": 5}, ""),
    ({"architectures": {"0": "LlamaForCausalLM"}}, ""),
    ({"architectures": ["LlamaForCausalLM"], "text_config": 5}, ""),
    (
        LLAMA | {"architectures": ["LlamaForSequenceClassification"], "id2label": 5},
        "",
    ),
]


@pytest.mark.parametrize(("raw", "named"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_values_are_told_in_one_line(raw: Raw, named: str) -> None:
    """A type checker that runs in the tests alone would say more, and refuse later."""
    error = refusal(raw)
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert named in error.message
    assert len(error.message) < 200
    assert "\n" not in error.message


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.floats()
    | st.sampled_from(["llama3", "linear", "default", "silu", FULL, SLIDING, ""])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
ROPE = st.dictionaries(st.sampled_from([*LLAMA3_ROPE, "type", "rope_theta", FULL, SLIDING]), JSON)
KEYS = sorted(
    {key for family in FAMILIES.values() for key in family.defaults}
    | {*QWEN3_MOE, "layer_types", "id2label", "num_local_experts", "quantization_config"}
    | {"_sliding_window_pattern", "attention_bias", "head_dim", "rope_local_base_freq"}
)
ARCHITECTURES = sorted(a for family in FAMILIES.values() for a in family.architectures)


@settings(max_examples=400, deadline=None)
@given(
    base=st.sampled_from([{}, LLAMA, GEMMA2, GEMMA3, QWEN3_MOE]),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5),
    more=st.fixed_dictionaries(
        {},
        optional={
            "architectures": st.lists(st.sampled_from(ARCHITECTURES), max_size=2) | JSON,
            "rope_scaling": ROPE | JSON,
            "rope_parameters": ROPE | JSON,
            "text_config": st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4) | JSON,
        },
    ),
)
def test_any_json_is_a_config_or_a_refusal(base: Raw, changes: Raw, more: Raw) -> None:
    try:
        config = read_config(base | changes | more)
    except ModelError as error:
        if error.reason not in (Reason.CHECKPOINT_CORRUPT, Reason.CHECKPOINT_UNSUPPORTED):
            raise
    else:
        assert config.num_parameters > 0
        assert len(config.layer_kinds) == config.num_layers
