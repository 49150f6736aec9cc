"""Mixture of experts: each token goes through its few best experts.

Two functions give the same sums. `one_by_one` sends every token through every expert and weighs
most by zero: wasteful in arithmetic, frugal in memory, and on CPU faster than gathering rows.
`grouped` sorts the tokens by expert, for accelerators. In neither do a token's numbers depend on
where its neighbours go.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from moorage_models.ops import Linear, contract, contract_groups
from moorage_models.sharding import TP

Weights = Mapping[str, Array]


def experts(x: Float[Array, "b t d"], weights: Weights, linear: Linear) -> Float[Array, "b t d"]:
    """The weighted sum of each token's experts, by the function that suits the devices."""
    shares, chosen = route(x, weights["moe.router"], linear)
    stacks = tuple(
        linear.gather(f"layers.moe.{name}", weights[f"moe.{name}"], x.dtype)
        for name in ("gate", "up", "down")
    )
    on_cpu = linear.mesh.devices.flat[0].platform == "cpu"
    run = one_by_one if on_cpu else grouped
    return run(x, stacks, shares, chosen, linear)


def route(
    x: Float[Array, "b t d"], router: Float[Array, "e d"], linear: Linear
) -> tuple[Float32[Array, "b t j"], Int[Array, "b t j"]]:
    """Which experts each token goes to, and with what weight.

    Softmax over all experts in float32, then the largest, which a config may renormalise to sum
    to one (Qwen3's published code).
    """
    router = linear.gather("layers.moe.router", router, jnp.float32)
    logits = contract("btd,ed->bte", x.astype(jnp.float32), router, jnp.float32)
    logits = linear.constrain(logits, None)
    probabilities = jax.nn.softmax(logits, axis=-1)
    shares, chosen = jax.lax.top_k(probabilities, linear.config.experts_per_token)
    if linear.config.norm_topk:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return shares, chosen


def one_by_one(
    x: Float[Array, "b t d"],
    stacks: tuple[Array, ...],
    shares: Float32[Array, "b t j"],
    chosen: Int[Array, "b t j"],
    linear: Linear,
) -> Float[Array, "b t d"]:
    """A scan over the experts; each tensor-parallel device scans over its own."""
    count = linear.config.num_experts
    groups = linear.mesh.shape[TP] if linear.on_tp("e") else 1
    one_hot = jax.nn.one_hot(chosen, count, dtype=jnp.float32)
    every_share = jnp.moveaxis(jnp.sum(one_hot * shares[..., None], axis=-2), -1, 0)

    def own(stack: Array) -> Array:
        """`[experts of a device, devices, ...]`."""
        return jnp.moveaxis(stack.reshape(groups, -1, *stack.shape[1:]), 1, 0)

    def one_expert(total: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
        gate, up, down, share = expert
        hidden = _gated(
            contract("btd,gmd->gbtm", x, gate, x.dtype), contract("btd,gmd->gbtm", x, up, x.dtype)
        )
        return total + share[..., None] * contract(
            "gbtm,gdm->gbtd", hidden, down, jnp.float32
        ), None

    total = jnp.zeros((groups, *x.shape), jnp.float32)
    total, _ = jax.lax.scan(one_expert, total, tuple(map(own, (*stacks, every_share))))
    return jnp.sum(total, axis=0).astype(x.dtype)


def grouped(
    x: Float[Array, "b t d"],
    stacks: tuple[Array, ...],
    shares: Float32[Array, "b t j"],
    chosen: Int[Array, "b t j"],
    linear: Linear,
) -> Float[Array, "b t d"]:
    """Rows sorted by expert; each tensor-parallel device multiplies those of its own experts."""
    split = linear.on_tp("e")
    by_expert = PartitionSpec(TP) if split else PartitionSpec()
    by_rows = linear.batch_spec(x)
    body = jax.shard_map(
        partial(_own_experts, axis=TP if split else None),
        mesh=linear.mesh,
        in_specs=(by_rows, (by_expert,) * 3, by_rows, by_rows),
        out_specs=by_rows,
        check_vma=False,
    )
    out: Array = body(x, stacks, shares, chosen)
    return out


def _own_experts(
    x: Array, stacks: tuple[Array, ...], shares: Array, chosen: Array, axis: str | None
) -> Array:
    """The part of the sum that this device's experts give, added up over the devices."""
    gate, up, down = stacks
    own = gate.shape[0]
    first = jax.lax.axis_index(axis) * own if axis else 0
    local = (chosen - first).reshape(-1)
    local = jnp.where((local >= 0) & (local < own), local, own)  # others last
    order = jnp.argsort(local, stable=True)
    sizes = jnp.bincount(local, length=own + 1)[:own]
    rows = x.reshape(-1, x.shape[-1])[order // chosen.shape[-1]]
    hidden = _gated(
        contract_groups(rows, gate, sizes, x.dtype), contract_groups(rows, up, sizes, x.dtype)
    )
    sent = contract_groups(hidden, down, sizes, jnp.float32)
    sent = jnp.where(jnp.arange(len(order))[:, None] < jnp.sum(sizes), sent, 0.0)
    back = sent[jnp.argsort(order)].reshape(*chosen.shape, -1)
    total = jnp.sum(back * shares[..., None], axis=-2)
    return (jax.lax.psum(total, axis) if axis else total).astype(x.dtype)


def _gated(gate: Array, up: Array) -> Array:
    return (jax.nn.silu(gate.astype(jnp.float32)) * up).astype(gate.dtype)
