"""How Flax Gemma and MaxText name, shape and fold Hugging Face's tensors, as tables.

In shapes: E width, D head dimension, M width of an expert, - what is left over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np


@dataclass(frozen=True)
class Family:
    """What becomes of a family's tensors.

    Attributes:
        norms: A layer's norms, from Hugging Face's name to MaxText's.
        query: Whether MaxText's query kernel is multiplied by D ** -0.5.
        embedding: MaxText's embedding is multiplied by sqrt(E) in this dtype; None leaves it.
        offset: What is added to every norm scale for MaxText.
        pairs: Whether one MaxText layer is two layers, local and global.
        block: The number of layers in a block of MaxText, where blocks are scanned.
        flax: A layer's norms, from Hugging Face's name to Flax's.
        gating: Flax's order of axes in the gate and up matrices, after the leading 2.
    """

    norms: Mapping[str, str]
    query: bool = False
    embedding: str | None = None
    offset: float = 0.0
    pairs: bool = False
    block: int = 1
    flax: Mapping[str, str] = field(default_factory=dict)
    gating: str = "FD"


LLAMA_NORMS = {
    "input_layernorm": "pre_self_attention_layer_norm",
    "post_attention_layernorm": "post_self_attention_layer_norm",
}
GEMMA1_NORMS = {
    "input_layernorm": "pre_self_attention_norm",
    "post_attention_layernorm": "pre_ffw_norm",
}
GEMMA_NORMS = {
    "input_layernorm": "pre_self_attention_norm",
    "post_attention_layernorm": "post_self_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FLAX1_NORMS = {
    "input_layernorm": "pre_attention_norm",
    "post_attention_layernorm": "pre_ffw_norm",
}
FLAX2_NORMS = {
    "input_layernorm": "pre_attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FLAX3_NORMS = FLAX2_NORMS | {
    "self_attn.q_norm": "attn/_query_norm",
    "self_attn.k_norm": "attn/_key_norm",
}
GEMMA3 = Family(GEMMA_NORMS, embedding="bfloat16", offset=1.0, block=6, flax=FLAX3_NORMS)
FAMILIES = {
    "LlamaForCausalLM": Family(LLAMA_NORMS, query=True),
    "Qwen2ForCausalLM": Family(LLAMA_NORMS),
    "Qwen3ForCausalLM": Family(LLAMA_NORMS),
    "Qwen3MoeForCausalLM": Family(LLAMA_NORMS),
    "GemmaForCausalLM": Family(
        GEMMA1_NORMS,
        query=True,
        embedding="float32",
        offset=1.0,
        flax=FLAX1_NORMS,
        gating="DF",
    ),
    "Gemma2ForCausalLM": Family(
        GEMMA_NORMS,
        query=True,
        embedding="float32",
        offset=1.0,
        pairs=True,
        flax=FLAX2_NORMS,
    ),
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3,
}

QUERY, KEY, VALUE = (f"self_attention/{part}/" for part in ("query", "key", "value"))

#: Hugging Face's tensors of a layer: the path in MaxText, and what the transposed tensor (the stack
#: of all experts' transposed tensors) is reshaped to.
MAXTEXT = {
    "self_attn.q_proj.weight": (QUERY + "kernel", ("E", "-", "D")),
    "self_attn.k_proj.weight": (KEY + "kernel", ("E", "-", "D")),
    "self_attn.v_proj.weight": (VALUE + "kernel", ("E", "-", "D")),
    "self_attn.q_proj.bias": (QUERY + "bias", ("-", "D")),
    "self_attn.k_proj.bias": (KEY + "bias", ("-", "D")),
    "self_attn.v_proj.bias": (VALUE + "bias", ("-", "D")),
    "self_attn.o_proj.weight": ("self_attention/out/kernel", ("-", "D", "E")),
    "self_attn.q_norm.weight": ("self_attention/query_norm/scale", ("D",)),
    "self_attn.k_norm.weight": ("self_attention/key_norm/scale", ("D",)),
    "mlp.gate_proj.weight": ("mlp/wi_0/kernel", ("E", "-")),
    "mlp.up_proj.weight": ("mlp/wi_1/kernel", ("E", "-")),
    "mlp.down_proj.weight": ("mlp/wo/kernel", ("-", "E")),
    "mlp.gate.weight": ("moe_block/gate/kernel", ("E", "-")),
    "mlp.experts.gate_proj.weight": ("moe_block/wi_0", ("-", "E", "M")),
    "mlp.experts.up_proj.weight": ("moe_block/wi_1", ("-", "E", "M")),
    "mlp.experts.down_proj.weight": ("moe_block/wo", ("-", "M", "E")),
}


@dataclass(frozen=True)
class Fusion:
    """Parameters of a layer that one of MaxText's options makes into one.

    Attributes:
        parts: Their paths.
        whole: The path of the one.
        join: Makes it of the list of them.
    """

    parts: tuple[str, ...]
    whole: str
    join: Callable[..., np.ndarray]


HEADS = partial(np.concatenate, axis=-2)
FUSIONS = {
    "fused_qkv": [
        Fusion((QUERY + kind, KEY + kind, VALUE + kind), f"self_attention/qkv_proj/{kind}", HEADS)
        for kind in ("kernel", "bias")
    ],
    "fused_mlp": [
        Fusion(("mlp/wi_0/kernel", "mlp/wi_1/kernel"), "mlp/wi/kernel", partial(np.stack, axis=1))
    ],
    "prefuse_moe_weights": [
        Fusion(
            ("moe_block/wi_0", "moe_block/wi_1"), "moe_block/wi", partial(np.concatenate, axis=-1)
        )
    ],
}

SIGLIP = ("SigLiPFromPatches_0/siglip_encoder/", "vision_encoder/Gemma3VisionEncoderLayer_0/")
PROJECTOR = ("transformer/embedder/", "vision_encoder/VisionEmbedder_0/")

#: A few tensors of the vision side, for readers to pass over: their paths in Flax and in MaxText.
VISION = {
    "patch_embedding.weight": [root + "embedding/kernel" for root in SIGLIP],
    "patch_embedding.bias": [root + "embedding/bias" for root in SIGLIP],
    "mm_input_projection_weight": [root + "mm_input_projection/w" for root in PROJECTOR],
    "mm_soft_emb_norm.weight": [root + "mm_soft_embedding_norm/scale" for root in PROJECTOR],
}


@dataclass(frozen=True)
class Form:
    """One way in which MaxText's programs lay a checkpoint out.

    Attributes:
        step: The folder of the step, if there are steps.
        item: The folder of the tree in it, if it has one of its own.
        prefix: What precedes every parameter's path in the tree.
        suffix: What follows it.
    """

    step: str = "0"
    item: str = "items"
    prefix: str = "params/params/"
    suffix: str = ""

    @property
    def given(self) -> str:
        """What a user gives as the path, below the folder that was written."""
        return f"{self.step}/{self.item}" if self.step else "."


FORMS = {
    "A": Form(),
    "B": Form(prefix="", suffix="/value"),
    "C": Form(step=""),
    "D": Form(step="", item=""),
    "SFT": Form(item="model_params", prefix="", suffix="/value"),
    "RL": Form(item="model_params", prefix="base/", suffix="/value"),
}
