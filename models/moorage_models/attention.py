"""Causal attention by blocks of queries: `[heads, T, T]` is never held."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moorage_models.config import ModelConfig
from moorage_models.ops import Linear, contract, softcap
from moorage_models.sharding import TP

#: Queries a block. Scores of one block are `[B, heads, 256, T]` in float32.
QUERY_BLOCK = 256

_MASKED = -(2.0**127)  # finite: a row that sees nothing gets the mean, never NaN


class Visibility(NamedTuple):
    """Which tokens see which; exactly one of the two is given.

    Attributes:
        segments: `[B, T]` int32; a token sees those before it in its segment. 0 is padding.
        mask: `[B, T, T]` bool, query by key.
    """

    segments: Int[Array, "b t"] | None = None
    mask: Bool[Array, "b t t"] | None = None

    def block(
        self, start: Int[Array, ""], size: int, window: Int[Array, ""], length: int
    ) -> Bool[Array, "b q t"]:
        """The mask of queries `start .. start + size`, a sliding window included."""
        queries = start + jnp.arange(size)[:, None]
        keys = jnp.arange(length)[None, :]
        near = queries - keys < window
        if self.mask is not None:
            return near & jax.lax.dynamic_slice_in_dim(self.mask, start, size, axis=1)
        assert self.segments is not None
        own = jax.lax.dynamic_slice_in_dim(self.segments, start, size, axis=1)[:, :, None]
        others = self.segments[:, None, :]
        return near & (keys <= queries) & (own == others) & (others != 0)


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    visible: Visibility,
    window: Int[Array, ""],
    linear: Linear,
) -> Float[Array, "b t n h"]:
    """Attention of every query to the keys that it sees; scores and softmax in float32.

    Args:
        q: Queries, after rotary; their length is at most, or a multiple of, `QUERY_BLOCK`.
        k: Keys, after rotary; each serves `n / k` consecutive query heads.
        v: Values.
        visible: Who sees whom.
        window: Keys at this distance or more are not seen.
        linear: Says how heads are split over the mesh.

    Returns:
        The values' weighted means, in the dtype of `q`.
    """
    config = linear.config
    batch, length, heads, head_dim = q.shape
    k, v = (repeat_heads(x, linear) for x in (k, v))
    block = min(QUERY_BLOCK, length)
    kv_heads = k.shape[2]
    q = q.reshape(batch, -1, block, kv_heads, heads // kv_heads, head_dim)

    def one_block(start_and_queries: tuple[Array, Array]) -> Array:
        start, queries = start_and_queries
        mask = visible.block(start, block, window, length)
        return _attend(queries, k, v, mask, config)

    starts = jnp.arange(q.shape[1]) * block
    if len(starts) == 1:
        out = one_block((starts[0], q[:, 0]))[:, None]
    else:
        out = jnp.moveaxis(jax.lax.map(one_block, (starts, jnp.moveaxis(q, 1, 0))), 0, 1)
    return linear.heads(out.reshape(batch, length, heads, head_dim))


def _attend(
    q: Float[Array, "b q k g h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    mask: Bool[Array, "b q t"],
    config: ModelConfig,
) -> Float[Array, "b q k g h"]:
    scores = contract("bqkgh,btkh->bkgqt", q, k, jnp.float32) * config.query_scale
    scores = softcap(scores, config.attn_softcap)
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return contract("bkgqt,btkh->bqkgh", weights, v, q.dtype)


def repeat_heads(x: Float[Array, "b t k h"], linear: Linear) -> Float[Array, "b t r h"]:
    """Repeats key or value heads until tp divides them, where the query heads are split over tp."""
    config, tp = linear.config, linear.mesh.shape.get(TP, 1)
    if config.num_heads % tp or x.shape[2] % tp == 0:
        return linear.heads(x)
    group = config.num_heads // x.shape[2]
    repeats = next(r for r in range(1, group + 1) if group % r == 0 and x.shape[2] * r % tp == 0)
    return linear.heads(jnp.repeat(x, repeats, axis=2))
