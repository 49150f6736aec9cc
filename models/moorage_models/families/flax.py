"""The Flax layout of Gemma, as Google publishes it on Kaggle and GCS.

Source: the checkpoints' tree as google-deepmind/gemma reads it. The published trees have flat keys
that begin with `transformer/`; what that library saves itself is nested, without it, and without
`w` below the feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moorage_models.layouts import Layout, Place, Row


def _places(layer: int, _: int) -> Iterable[Place]:
    return (Place(f"layer_{layer}"),)


def _gating(part: int) -> tuple[Row, ...]:
    """Gate and up stand together; which axis comes first differs by release, and shape tells."""
    return tuple(
        Row(key, pattern, select=part)
        for key in ("mlp/gating_einsum/w", "mlp/gating_einsum")
        for pattern in ("S D F -> F D", "S F D -> F D")
    )


_GEMMA: Mapping[str, tuple[Row, ...]] = {
    "embed": (Row("embedder/input_embedding", "V D -> V D"),),
    "final_norm": (Row("final_norm/scale", "D -> D"),),
    "layers.attn_norm": (Row("pre_attention_norm/scale", "D -> D"),),
    "layers.attn.q": (
        Row("attn/q_einsum/w", "N D H -> (N H) D"),
        Row("attn/qkv_einsum/w", "S N D H -> (N H) D", select=0),
    ),
    "layers.attn.k": (
        Row("attn/kv_einsum/w", "S K D H -> (K H) D", select=0),
        Row("attn/qkv_einsum/w", "S K D H -> (K H) D", select=1),
    ),
    "layers.attn.v": (
        Row("attn/kv_einsum/w", "S K D H -> (K H) D", select=1),
        Row("attn/qkv_einsum/w", "S K D H -> (K H) D", select=2),
    ),
    "layers.attn.o": (Row("attn/attn_vec_einsum/w", "N H D -> D (N H)"),),
    "layers.mlp_norm": (Row("pre_ffw_norm/scale", "D -> D"),),
    "layers.mlp.gate": _gating(0),
    "layers.mlp.up": _gating(1),
    "layers.mlp.down": (Row("mlp/linear/w", "F D -> D F"), Row("mlp/linear", "F D -> D F")),
}

_POST_NORMS: Mapping[str, tuple[Row, ...]] = {
    "layers.attn_post_norm": (Row("post_attention_norm/scale", "D -> D"),),
    "layers.mlp_post_norm": (Row("post_ffw_norm/scale", "D -> D"),),
}

_QK_NORMS: Mapping[str, tuple[Row, ...]] = {
    "layers.attn.q_norm": (Row("attn/_query_norm/scale", "H -> H"),),
    "layers.attn.k_norm": (Row("attn/_key_norm/scale", "H -> H"),),
}

#: By family; no other was published in Flax.
LAYOUTS: Mapping[str, Layout] = {
    "gemma": Layout("Flax", _GEMMA, _places),
    "gemma2": Layout("Flax", {**_GEMMA, **_POST_NORMS}, _places),
    "gemma3": Layout("Flax", {**_GEMMA, **_POST_NORMS, **_QK_NORMS}, _places),
}
