"""Causal attention by blocks of queries: `[heads, T, T]` is never held."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from moorage_models.ops import Linear, contract, softcap
from moorage_models.sharding import TP

#: Queries a block. Scores of one row's block are `[heads, 256, T]` in float32.
QUERY_BLOCK = 256

#: Rows run together as long as a device's block has no more scores: so many stay in its caches.
BLOCK_SCORES = 1 << 20

#: Keys that are added up at once on CPU: segments that start at multiples keep their bits.
KEY_RUN = 64

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
        queries = start + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        keys = jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
        near = queries - keys < window
        if self.mask is not None:
            return near & jax.lax.dynamic_slice_in_dim(self.mask, start, size, axis=1)
        assert self.segments is not None
        own = jax.lax.dynamic_slice_in_dim(self.segments, start, size, axis=1)
        own, others = jnp.expand_dims(own, 2), jnp.expand_dims(self.segments, 1)
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
    batch, length, heads, head_dim = q.shape
    # Heads before tokens: else the CPU's compiler transposes the scores, not their operands.
    k, v = (jnp.moveaxis(repeat_heads(x, linear), 1, 2) for x in (k, v))
    q = jnp.transpose(q.reshape(batch, length, k.shape[1], -1, head_dim), (0, 2, 3, 1, 4))
    block, ways = _block(length), linear.ways(batch)
    own_heads = heads // linear.mesh.shape[TP] if linear.on_tp("n") else heads
    rows = _rows_at_a_time(batch // ways, own_heads * block * length)

    def one_block(at: tuple[Array, Array]) -> Array:
        first, start = at
        own_q, own_k, own_v, seen = jax.tree.map(
            lambda x: _rows_of(x, first, rows, ways), (q, k, v, visible)
        )
        queries = jax.lax.dynamic_slice_in_dim(own_q, start, block, axis=3)
        mask = seen.block(start, block, window, length)
        end = length if seen.segments is None else start + block
        return _attend(queries, own_k, own_v, mask, end, linear)

    firsts, starts = jnp.arange(0, batch // ways, rows), jnp.arange(0, length, block)
    steps = (jnp.repeat(firsts, len(starts)), jnp.tile(starts, len(firsts)))
    is_one = len(firsts) * len(starts) == 1
    out = one_block((firsts[0], starts[0])) if is_one else jax.lax.map(one_block, steps)
    out = out.reshape(len(firsts), len(starts), ways, rows, *q.shape[1:3], block, head_dim)
    out = jnp.transpose(out, (2, 0, 3, 1, 6, 4, 5, 7))
    return linear.heads(out.reshape(batch, length, heads, head_dim))


def _block(length: int) -> int:
    """Queries a block, of which there are at least two if length is even.

    One would be no loop, and XLA's CPU compiler multiplies bfloat16 in float32 where an operand is
    transposed beside its product, with other bits than in a loop that is given it.
    """
    return QUERY_BLOCK if length > QUERY_BLOCK else length if length % 2 else length // 2


def _rows_of(x: Array, first: Int[Array, ""], rows: int, ways: int) -> Array:
    """Some rows of each of the devices that rows are split over."""
    by_device = x.reshape(ways, -1, *x.shape[1:])
    some = jax.lax.dynamic_slice_in_dim(by_device, first, rows, axis=1)
    return some.reshape(-1, *x.shape[1:])


def _rows_at_a_time(rows: int, row_scores: int) -> int:
    """The largest part of the rows, dividing them, whose scores are few enough; at least one."""
    fitting = (n for n in range(rows, 0, -1) if rows % n == 0 and n * row_scores <= BLOCK_SCORES)
    return next(fitting, 1)


def _attend(
    q: Float[Array, "b k g q h"],
    k: Float[Array, "b k t h"],
    v: Float[Array, "b k t h"],
    mask: Bool[Array, "b q t"],
    end: Int[Array, ""] | int,
    linear: Linear,
) -> Float[Array, "b k g q h"]:
    batch, kv_heads, groups, block, head_dim = q.shape
    rows = q.reshape(batch, kv_heads, groups * block, head_dim)
    scores = contract("bkrh,bkth->bkrt", rows, k, jnp.float32) * linear.config.query_scale
    scores = softcap(scores, linear.config.attn_softcap).reshape(*q.shape[:4], -1)
    scores = jnp.where(jnp.expand_dims(mask, (1, 2)), scores, _MASKED)
    scores = scores.reshape(*rows.shape[:3], -1)
    on_cpu = linear.mesh.devices.flat[0].platform == "cpu"
    total, values = _sums(scores, v, end, min(KEY_RUN, v.shape[2]) if on_cpu else v.shape[2])
    return (values / total).astype(q.dtype).reshape(q.shape)


def _sums(
    scores: Float32[Array, "b k r t"],
    v: Float[Array, "b k t h"],
    end: Int[Array, ""] | int,
    size: int,
) -> tuple[Float32[Array, "b k r 1"], Float32[Array, "b k r h"]]:
    """The softmax's sums of weights and of weighted values, `size` keys after `size` keys.

    A compiler that may cut all keys as it likes cuts from the first of the row on, and so adds up a
    segment in another order at another place. The zeros around a segment change nothing, and those
    from `end` on are left out.
    """
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))

    def run(start: Array | int, size: int) -> tuple[Array, Array]:
        own = jax.lax.dynamic_slice_in_dim(scores, start, size, axis=3)
        values = jax.lax.dynamic_slice_in_dim(v, start, size, axis=2)
        weights = jnp.exp(own - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return total, contract("bkrt,bkth->bkrh", weights.astype(v.dtype), values, jnp.float32)

    def add(start: Array | int, size: int, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        def added() -> tuple[Array, Array]:
            total, values = run(start, size)
            return sums[0] + total, sums[1] + values

        found: tuple[Array, Array] = jax.lax.cond(start < end, added, lambda: sums)
        return found

    whole, rest = divmod(v.shape[2], size)
    sums: tuple[Array, Array] = jax.lax.fori_loop(
        1, whole, lambda i, sums: add(i * size, size, sums), run(0, size)
    )
    return add(whole * size, rest, sums) if rest else sums


def repeat_heads(x: Float[Array, "b t k h"], linear: Linear) -> Float[Array, "b t r h"]:
    """Repeats key or value heads until tp divides them, where the query heads are split over tp."""
    config, tp = linear.config, linear.mesh.shape.get(TP, 1)
    if config.num_heads % tp or x.shape[2] % tp == 0:
        return linear.heads(x)
    group = config.num_heads // x.shape[2]
    repeats = next(r for r in range(1, group + 1) if group % r == 0 and x.shape[2] * r % tp == 0)
    return linear.heads(jnp.repeat(x, repeats, axis=2))
