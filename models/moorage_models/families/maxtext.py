"""MaxText's layout: one tree a family, scanned over the layers or not.

Source: MaxText 0.2.5, its parameter mappings and its model code. What MaxText folds into the
weights is named in the rows and undone on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from moorage_models.config import ModelConfig
from moorage_models.errors import ModelError, Reason
from moorage_models.layouts import Layout, Place, Row

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
    return (Place(f"decoder/layers_{layer}"), scanned)


def _rows(**keys: Row) -> Rows:
    return {name.replace("__", "."): (row,) for name, row in keys.items()}


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

_GEMMA_NORMS: Rows = {
    "layers.attn_norm": (Row("pre_self_attention_norm@/scale", "D -> D"),),
    "layers.mlp_norm": (Row("pre_ffw_norm@/scale", "D -> D"),),
}

_POST_NORMS: Rows = {
    "layers.attn_post_norm": (Row("post_self_attention_norm@/scale", "D -> D"),),
    "layers.mlp_post_norm": (Row("post_ffw_norm@/scale", "D -> D"),),
}


def _folded(rows: Rows, **folds: str) -> Rows:
    """The same rows with folds, by the end of the parameter's name."""
    return {
        name: tuple(replace(row, fold=_fold(name, folds) or row.fold) for row in alternatives)
        for name, alternatives in rows.items()
    }


def _fold(name: str, folds: Mapping[str, str]) -> str:
    return next((fold for end, fold in folds.items() if name.endswith(end)), "")


def _interleaved(rows: Rows) -> Rows:
    order = {
        name: tuple(replace(row, interleaved=True) for row in rows[name])
        for name in ("layers.attn.q", "layers.attn.k")
    }
    return {**rows, **order}


_LLAMA = _folded(_BASE, **{".q": "query"})
_GEMMA = {**_BASE, **_GEMMA_NORMS}
_GEMMA_FOLDS = {"embed": "embedding", "norm": "one plus", ".q": "query"}
_GEMMA3_FOLDS = {"embed": "bfloat16 embedding", "norm": "one plus"}

#: By the option `maxtext_rotary`.
LLAMA3: Mapping[str, Layout] = {
    "halves": Layout("MaxText", _LLAMA, _plain),
    "interleaved": Layout("MaxText", _interleaved(_LLAMA), _plain),
}

#: What a caller may have to say, and which values there are.
OPTIONS = ("maxtext_rotary", "maxtext_query_scale")

#: What the name of a Llama tells of `maxtext_rotary`; of 3.3, whose checkpoints differ, nothing.
_ROTARY: Mapping[str, str] = {"llama3": "halves", "llama3p1": "interleaved"}

_PLAIN: Mapping[str, Layout] = {
    "qwen2": Layout("MaxText", {**_BASE, **_BIASES}, _plain),
    "qwen3": Layout("MaxText", {**_BASE, **_QK_NORMS, **_EXPERTS}, _plain),
    "gemma": Layout("MaxText", _folded(_GEMMA, **_GEMMA_FOLDS), _plain),
    "gemma3": Layout(
        "MaxText", _folded({**_GEMMA, **_POST_NORMS, **_QK_NORMS}, **_GEMMA3_FOLDS), _blocks
    ),
}

#: By the option `maxtext_query_scale`: the square root of what the query kernel was divided by.
GEMMA2: Mapping[str, Layout] = {
    "head_dim": Layout("MaxText", _folded({**_GEMMA, **_POST_NORMS}, **_GEMMA_FOLDS), _pairs),
    "width_per_head": Layout(
        "MaxText",
        _folded({**_GEMMA, **_POST_NORMS}, **{**_GEMMA_FOLDS, ".q": "query by width"}),
        _pairs,
    ),
}


def choose(config: ModelConfig, model_family: str, options: Mapping[str, str]) -> Layout | None:
    """The layout of a MaxText checkpoint, which the file alone does not always tell.

    None if the family has no such layout.

    Args:
        config: The model's configuration.
        model_family: The standard family in the model's name, or "".
        options: What the caller says: `maxtext_rotary`, `maxtext_query_scale`.

    Raises:
        ModelError: INVALID_REQUEST if the caller has to say more, or says something else.
    """
    if config.family == "llama3":
        option, layouts, told = "maxtext_rotary", LLAMA3, _ROTARY.get(model_family, "")
    elif config.family == "gemma2":
        option, layouts, told = "maxtext_query_scale", GEMMA2, _query_scale(config)
    else:
        return _PLAIN.get(config.family)
    choice = options.get(option, told)
    if choice in layouts:
        return layouts[choice]
    raise ModelError(
        Reason.INVALID_REQUEST,
        f"a MaxText checkpoint of {model_family or config.family} does not tell {option}: "
        f"set the option {option} to {' or '.join(layouts)} (found: {choice or 'nothing'})",
    )


def _query_scale(config: ModelConfig) -> str:
    """Converters differ only where the scale is not that of the head dimension."""
    return "head_dim" if config.query_scale == config.head_dim**-0.5 else ""
