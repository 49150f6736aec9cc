"""What a family is: data that the rest of the package reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moorage_models.config import ModelConfig

#: Where Llama-like checkpoints keep each parameter; `*` stands for the layer, `#` for the expert.
BASE_TENSORS: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "score": "score.weight",
    "layers.attn_norm": "model.layers.*.input_layernorm.weight",
    "layers.attn.q": "model.layers.*.self_attn.q_proj.weight",
    "layers.attn.k": "model.layers.*.self_attn.k_proj.weight",
    "layers.attn.v": "model.layers.*.self_attn.v_proj.weight",
    "layers.attn.o": "model.layers.*.self_attn.o_proj.weight",
    "layers.mlp_norm": "model.layers.*.post_attention_layernorm.weight",
    "layers.mlp.gate": "model.layers.*.mlp.gate_proj.weight",
    "layers.mlp.up": "model.layers.*.mlp.up_proj.weight",
    "layers.mlp.down": "model.layers.*.mlp.down_proj.weight",
}

#: The four norms of a Gemma 2 or Gemma 3 layer.
POST_NORM_TENSORS: Mapping[str, str] = {
    "layers.attn_post_norm": "model.layers.*.post_attention_layernorm.weight",
    "layers.mlp_norm": "model.layers.*.pre_feedforward_layernorm.weight",
    "layers.mlp_post_norm": "model.layers.*.post_feedforward_layernorm.weight",
}

QKV_BIAS_TENSORS: Mapping[str, str] = {
    "layers.attn.q_bias": "model.layers.*.self_attn.q_proj.bias",
    "layers.attn.k_bias": "model.layers.*.self_attn.k_proj.bias",
    "layers.attn.v_bias": "model.layers.*.self_attn.v_proj.bias",
}

QK_NORM_TENSORS: Mapping[str, str] = {
    "layers.attn.q_norm": "model.layers.*.self_attn.q_norm.weight",
    "layers.attn.k_norm": "model.layers.*.self_attn.k_norm.weight",
}

EXPERT_TENSORS: Mapping[str, str] = {
    "layers.moe.router": "model.layers.*.mlp.gate.weight",
    "layers.moe.gate": "model.layers.*.mlp.experts.#.gate_proj.weight",
    "layers.moe.up": "model.layers.*.mlp.experts.#.up_proj.weight",
    "layers.moe.down": "model.layers.*.mlp.experts.#.down_proj.weight",
}


#: Newer transformers may store all experts of a layer in one tensor, gate rows before up rows.
FUSED_EXPERT_TENSORS: Mapping[str, tuple[str, ...]] = {
    "model.layers.*.mlp.experts.gate_up_proj": (
        "model.layers.*.mlp.experts.#.gate_proj.weight",
        "model.layers.*.mlp.experts.#.up_proj.weight",
    ),
    "model.layers.*.mlp.experts.down_proj": ("model.layers.*.mlp.experts.#.down_proj.weight",),
}


@dataclass(frozen=True)
class Prefix:
    """How the names of one line of models begin.

    Attributes:
        family: The standardised name, for example `llama3p1`; config ids begin with it and `_`.
        hf: Lower-cased beginnings in Hugging Face style.
    """

    family: str
    hf: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Models that one table of weights and one set of switches describe.

    Attributes:
        name: The family's name; `ModelConfig.family` of its members.
        category: The configuration class in the naming rules.
        prefixes: How the names of its members begin.
        architectures: Class names in a checkpoint's `config.json`, with the `model_type` beside
            them. Of each kind (language model or reward model, dense or `Moe`), the first is
            what is written.
        switches: `ModelConfig` fields that all members share.
        defaults: Keys that a `config.json` may leave out, with the values that transformers'
            configuration class of this family gives them.
        architecture_defaults: The same for one architecture, where its class differs.
        presets: Configurations by config id, from the published `config.json` of each.
        tensors: Where a Hugging Face checkpoint keeps each parameter.
        fused: Tensors that hold several, by what they hold of each expert, one after another.
        renames: Beginnings of tensor names and what they stand for.
        ignorable: Beginnings or ends of tensor names that are not part of the text decoder.
    """

    name: str
    category: str
    prefixes: tuple[Prefix, ...]
    architectures: Mapping[str, str]
    switches: Mapping[str, Any]
    defaults: Mapping[str, Any]
    presets: Mapping[str, ModelConfig]
    tensors: Mapping[str, str]
    architecture_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    ignorable: tuple[str, ...] = (".rotary_emb.inv_freq",)
