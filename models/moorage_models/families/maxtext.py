"""MaxText's layout: one tree a family, scanned over the layers or not.

Source: MaxText 0.2.5, its parameter mappings and its model code. What MaxText folds into the
weights is named in the rows and undone on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moorage_models.config import ModelConfig
from moorage_models.errors import ModelError, Reason
from moorage_models.layouts import Layout, Place, Row, rounded_root

Rows = Mapping[str, tuple[Row, ...]]


def _plain(layer: int, _: int) -> Iterable[Place]:
    return (Place(f"decoder/layers_{layer}"), Place("decoder/layers", index=layer))


def _pairs(layer: int, _: int) -> Iterable[Place]:
    """Gemma 2: a layer of MaxText's is a pair, local and global."""
    suffix = ("_local", "_global")[layer % 2]
    return (
        Place(f"decoder/layers_{layer // 2}", suffix),
        Place("decoder/layers", suffix, layer // 2),
    )


def _blocks(layer: int, layers: int) -> Iterable[Place]:
    """Gemma 3, scanned: blocks of six, and the rest without a layer axis."""
    block, within = divmod(layer, 6)
    if block < layers // 6:
        scanned = Place(f"decoder/layers/layers_{within}", index=block)
    else:
        scanned = Place(f"decoder/layers_remainder/layers_{within}")
    old = Place("decoder/layers", index=layer)  # the older converter has one stack of all
    return (Place(f"decoder/layers_{layer}"), scanned, old)


_BASE: Rows = {
    "embed": (Row("token_embedder/embedding", "V D -> V D"),),
    "final_norm": (Row("decoder/decoder_norm/scale", "D -> D"),),
    "head": (Row("decoder/logits_dense/kernel", "D V -> V D"),),
    "layers.attn.q": (Row("self_attention@/query/kernel", "D N H -> (N H) D"),),
    "layers.attn.k": (Row("self_attention@/key/kernel", "D K H -> (K H) D"),),
    "layers.attn.v": (Row("self_attention@/value/kernel", "D K H -> (K H) D"),),
    "layers.attn.o": (Row("self_attention@/out/kernel", "N H D -> D (N H)"),),
    "layers.mlp.gate": (Row("mlp@/wi_0/kernel", "D F -> F D"),),
    "layers.mlp.up": (Row("mlp@/wi_1/kernel", "D F -> F D"),),
    "layers.mlp.down": (Row("mlp@/wo/kernel", "F D -> D F"),),
    "layers.attn_norm": (Row("pre_self_attention_layer_norm/scale", "D -> D"),),
    "layers.mlp_norm": (Row("post_self_attention_layer_norm/scale", "D -> D"),),
}

_QK_NORMS: Rows = {
    "layers.attn.q_norm": (Row("self_attention@/query_norm/scale", "H -> H"),),
    "layers.attn.k_norm": (Row("self_attention@/key_norm/scale", "H -> H"),),
}

_BIASES: Rows = {
    "layers.attn.q_bias": (Row("self_attention@/query/bias", "N H -> (N H)"),),
    "layers.attn.k_bias": (Row("self_attention@/key/bias", "K H -> (K H)"),),
    "layers.attn.v_bias": (Row("self_attention@/value/bias", "K H -> (K H)"),),
}

_EXPERTS: Rows = {
    "layers.moe.router": (Row("moe_block/gate/kernel", "D X -> X D"),),
    "layers.moe.gate": (Row("moe_block/wi_0", "X D M -> X M D"),),
    "layers.moe.up": (Row("moe_block/wi_1", "X D M -> X M D"),),
    "layers.moe.down": (Row("moe_block/wo", "X M D -> X D M"),),
}

#: The same parameters where MaxText was told to store some together.
_FUSED: Rows = {
    "layers.attn.q": (Row("self_attention@/qkv_proj/kernel", "D Q H -> (Q H) D", part="query"),),
    "layers.attn.k": (Row("self_attention@/qkv_proj/kernel", "D Q H -> (Q H) D", part="key"),),
    "layers.attn.v": (Row("self_attention@/qkv_proj/kernel", "D Q H -> (Q H) D", part="value"),),
    "layers.attn.q_bias": (Row("self_attention@/qkv_proj/bias", "Q H -> (Q H)", part="query"),),
    "layers.attn.k_bias": (Row("self_attention@/qkv_proj/bias", "Q H -> (Q H)", part="key"),),
    "layers.attn.v_bias": (Row("self_attention@/qkv_proj/bias", "Q H -> (Q H)", part="value"),),
    "layers.mlp.gate": (Row("mlp@/wi/kernel", "D S F -> F D", select=0),),
    "layers.mlp.up": (Row("mlp@/wi/kernel", "D S F -> F D", select=1),),
    "layers.moe.gate": (Row("moe_block/wi", "X D W -> X W D", part="gate"),),
    "layers.moe.up": (Row("moe_block/wi", "X D W -> X W D", part="up"),),
}

_GEMMA_NORMS: Rows = {
    "layers.attn_norm": (Row("pre_self_attention_norm@/scale", "D -> D"),),
    "layers.mlp_norm": (Row("pre_ffw_norm@/scale", "D -> D"),),
}

_POST_NORMS: Rows = {
    "layers.attn_post_norm": (Row("post_self_attention_norm@/scale", "D -> D"),),
    "layers.mlp_post_norm": (Row("post_ffw_norm@/scale", "D -> D"),),
}


def _alternative(rows: Rows, more: Rows) -> Rows:
    """The same rows, and others to try where their arrays are not there."""
    return {name: (*alternatives, *more.get(name, ())) for name, alternatives in rows.items()}


def _folded(rows: Rows, folds: Mapping[str, str]) -> Rows:
    """The same rows with folds, by the end of the parameter's name."""

    def fold(name: str, row: Row) -> Row:
        found = next((fold for end, fold in folds.items() if name.endswith(end)), row.fold)
        return replace(row, fold=found)

    return {name: tuple(fold(name, row) for row in rows[name]) for name in rows}


def _interleaved(rows: Rows) -> Rows:
    order = {
        name: tuple(replace(row, interleaved=True) for row in rows[name])
        for name in ("layers.attn.q", "layers.attn.k")
    }
    return {**rows, **order}


_FUSED_BASE = _alternative(_BASE, _FUSED)
_GEMMA = {**_FUSED_BASE, **_GEMMA_NORMS}
_ONE_PLUS = {"norm": "one plus"}

#: The rows of each family, and where its layers may be.
_FAMILIES: Mapping[str, tuple[Rows, Callable[[int, int], Iterable[Place]]]] = {
    "llama3": (_folded(_FUSED_BASE, {".q": "query by head_dim"}), _plain),
    "qwen2": ({**_FUSED_BASE, **_alternative(_BIASES, _FUSED)}, _plain),
    "qwen3": ({**_FUSED_BASE, **_QK_NORMS, **_alternative(_EXPERTS, _FUSED)}, _plain),
    "gemma": (_folded(_GEMMA, {**_ONE_PLUS, ".q": "query by head_dim"}), _plain),
    "gemma2": (_folded({**_GEMMA, **_POST_NORMS}, _ONE_PLUS), _pairs),
    "gemma3": (
        _folded({**_GEMMA, **_POST_NORMS, **_QK_NORMS}, _ONE_PLUS),
        _blocks,
    ),
}


@dataclass(frozen=True)
class Question:
    """What a checkpoint of some families may not tell of itself.

    Attributes:
        families: Which.
        told: The answer, where the config or the family in the model's name gives it, else "".
        answers: What each answer does to the rows.
    """

    families: tuple[str, ...]
    told: Callable[[ModelConfig, str], str]
    answers: Mapping[str, Callable[[Rows], Rows]]


#: By the name of the option that answers them.
OPTIONS: Mapping[str, Question] = {
    # Llama 3.3's converters disagree, and its name tells nothing.
    "maxtext_rotary": Question(
        ("llama3",),
        lambda _, family: {"llama3": "halves", "llama3p1": "interleaved"}.get(family, ""),
        {"halves": lambda rows: rows, "interleaved": _interleaved},
    ),
    # Two converters divide the query of Gemma 2 27B by different roots.
    "maxtext_query_scale": Question(
        ("gemma2",),
        lambda config, _: "head_dim" if config.query_scale == config.head_dim**-0.5 else "",
        {
            "head_dim": lambda rows: _folded(rows, {".q": "query by head_dim"}),
            "query_scale": lambda rows: _folded(rows, {".q": "query by query_scale"}),
        },
    ),
    # Older converters round sqrt(embed_dim) to bfloat16, which for some sizes changes nothing; all
    # of Gemma 3's do, unless they are given float32 weights.
    "maxtext_embedding_scale": Question(
        ("gemma", "gemma2", "gemma3"),
        lambda c, _: "bfloat16" if c.family == "gemma3" else "float32" * _root_is_exact(c),
        {
            "float32": lambda rows: _folded(rows, {"embed": "embedding"}),
            "bfloat16": lambda rows: _folded(rows, {"embed": "bfloat16 embedding"}),
        },
    ),
}


def choose(config: ModelConfig, model_family: str, options: Mapping[str, str]) -> Layout | None:
    """The layout of a MaxText checkpoint, which the file alone does not always tell.

    None if the family has no such layout.

    Args:
        config: The model's configuration.
        model_family: The standard family in the model's name, or "".
        options: What the caller says, by names in `OPTIONS`.

    Raises:
        ModelError: INVALID_REQUEST if the caller has to say more, or says something else.
    """
    if config.family not in _FAMILIES:
        return None
    rows, places = _FAMILIES[config.family]
    for name, question in OPTIONS.items():
        if config.family in question.families:
            answer = options.get(name, question.told(config, model_family))
            if answer not in question.answers:
                raise ModelError(
                    Reason.INVALID_REQUEST,
                    f"a MaxText checkpoint of {model_family or config.family} does not tell "
                    f"{name}: set that option to {' or '.join(question.answers)}"
                    + (f"; it is {answer!r}" if answer else ""),
                )
            rows = question.answers[answer](rows)
    return Layout("MaxText", rows, places)


def _root_is_exact(config: ModelConfig) -> bool:
    return bool(rounded_root(config.embed_dim) == np.float32(config.embed_dim**0.5))
