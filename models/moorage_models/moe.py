"""Mixture of experts: each token goes through its few best experts."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moorage_models.ops import Linear, contract


def route(
    logits: Float[Array, "b t e"], per_token: int, *, normalise: bool
) -> Float[Array, "b t e"]:
    """The weight of every expert for every token, zero for those not chosen.

    Softmax over all experts in float32, then the `per_token` largest, which `normalise` makes sum
    to one (Qwen3's published code).
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    top, chosen = jax.lax.top_k(probabilities, per_token)
    if normalise:
        top = top / jnp.sum(top, axis=-1, keepdims=True)
    one_hot = jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32)
    return jnp.sum(one_hot * top[..., None], axis=-2)


def experts(
    x: Float[Array, "b t d"], weights: Mapping[str, Array], linear: Linear
) -> Float[Array, "b t d"]:
    """The weighted sum of the chosen experts, one expert after another.

    Every expert sees every token, and a token's share of an expert that it was not sent to is
    zero: no token's bits depend on where its neighbours go. Memory is that of one expert.
    """
    config = linear.config
    router = linear.gather("layers.moe.router", weights["moe.router"], jnp.float32)
    logits = contract("btd,ed->bte", x.astype(jnp.float32), router, jnp.float32)
    shares = route(logits, config.experts_per_token, normalise=config.norm_topk)

    def one_expert(total: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
        gate, up, down, share = expert
        hidden = jax.nn.silu(_expert_project(x, "gate", gate, linear))
        hidden = hidden * _expert_project(x, "up", up, linear)
        return total + share[..., None] * _expert_project(hidden, "down", down, linear), None

    total = jnp.zeros(x.shape, jnp.float32)
    stacks = tuple(weights[f"moe.{name}"] for name in ("gate", "up", "down"))
    total, _ = jax.lax.scan(one_expert, total, (*stacks, jnp.moveaxis(shares, -1, 0)))
    return total.astype(x.dtype)


def _expert_project(x: Array, name: str, weight: Array, linear: Linear) -> Array:
    return linear.project(x, f"layers.moe.{name}", weight)
