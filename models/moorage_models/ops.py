"""Products, norms and rotary embeddings: the arithmetic that every layer shares."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from moorage_models.config import ModelConfig, RopeScaling
from moorage_models.parameters import PARAMETERS
from moorage_models.sharding import FSDP, TP, Spec, compute_spec, splits_over_tp


def contract(subscripts: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    """The einsum of two arrays: every product of the decoder goes through here.

    Sums are kept in float32. float32 operands are multiplied in full: a TPU's default would
    round them to bfloat16 first.

    Args:
        subscripts: As in `jnp.einsum`.
        a: Left operand.
        b: Right operand, of the same dtype.
        dtype: Dtype of the result.
    """
    with jax.named_scope("contract"):
        return jnp.einsum(
            subscripts,
            a,
            b,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        ).astype(dtype)


def contract_groups(
    rows: Float[Array, "r i"],
    weights: Float[Array, "g o i"],
    sizes: Int[Array, " g"],
    dtype: DTypeLike,
) -> Float[Array, "r o"]:
    """`contract` of consecutive groups of rows, each with a weight of its own.

    Args:
        rows: The rows, group after group; those after the last group give what is not defined.
        weights: One weight a group.
        sizes: Rows of each group.
        dtype: Dtype of the result.
    """
    # A TPU's kernel knows no other precision for bfloat16, whose products are exact in float32.
    exact = rows.dtype == weights.dtype == jnp.bfloat16
    with jax.named_scope("contract"):
        return jax.lax.ragged_dot(
            rows,
            jnp.swapaxes(weights, 1, 2),
            sizes.astype(jnp.int32),
            precision=None if exact else jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        ).astype(dtype)


@dataclass(frozen=True)
class Linear:
    """Multiplies by parameters, wherever they are laid on the mesh.

    Attributes:
        config: The decoder's configuration.
        mesh: The device mesh; axes are Auto.
    """

    config: ModelConfig
    mesh: Mesh

    def project(
        self, x: Float[Array, "b t i"], name: str, weight: Float[Array, "o i"]
    ) -> Float[Array, "b t o"]:
        """`x @ weight.T` in the dtype of `x`, with the weight gathered over fsdp first."""
        y = contract("bti,oi->bto", x, self.gather(name, weight, x.dtype), x.dtype)
        return self.activation(y, _letters(name, weight)[0])

    def gather(self, name: str, weight: Array, dtype: DTypeLike) -> Array:
        """A parameter as it is multiplied: cast, gathered over fsdp, split over tp by units.

        The gather is stated, never left to the partitioner: its choice would depend on the
        mesh, and with it the bits.
        """
        spec = compute_spec(_letters(name, weight), self.config, dict(self.mesh.shape))
        return self._lay(weight.astype(dtype), partition(spec))

    def activation(self, x: Array, letter: str = "d") -> Array:
        """Splits activations `[batch, ..., letter]`: batch over fsdp, the last axis over tp."""
        return self.constrain(x, x.ndim - 1 if self.on_tp(letter) else None)

    def heads(self, x: Array) -> Array:
        """Splits `[batch, tokens, heads, ...]`: batch over fsdp, heads over tp if they divide."""
        return self.constrain(x, 2 if self.on_tp("n") else None)

    def constrain(self, x: Array, tp_axis: int | None) -> Array:
        """States the layout of activations whose first axis is the batch."""
        axes: list[str | None] = [*self.batch_spec(x), *[None] * (x.ndim - 1)]
        if tp_axis is not None:
            axes[tp_axis] = TP
        return self._lay(x, PartitionSpec(*axes))

    def _lay(self, x: Array, spec: PartitionSpec) -> Array:
        laid: Array = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
        return laid

    def batch_spec(self, x: Array) -> PartitionSpec:
        """How the first axis of activations is split."""
        return PartitionSpec(FSDP if self.ways(x.shape[0]) > 1 else None)

    def ways(self, batch: int) -> int:
        """Over how many devices so many rows are split: those of fsdp, if they divide."""
        ways = self.mesh.shape.get(FSDP, 1)
        return ways if batch % ways == 0 else 1

    def on_tp(self, letter: str) -> bool:
        """Whether tensor parallelism splits the axis of this letter."""
        return splits_over_tp(letter, self.config, dict(self.mesh.shape))


def _letters(name: str, weight: Array) -> list[str]:
    """The axes' letters; a single expert has only the trailing ones."""
    return PARAMETERS[name].axes.split()[-weight.ndim :]


def partition(spec: Spec) -> PartitionSpec:
    """A spec in jax's form."""
    return PartitionSpec(*(split or None for split in spec))


def rms_norm(
    x: Float[Array, "*batch d"], weight: Float[Array, " d"], eps: float, *, offset: bool
) -> Float32[Array, "*batch d"]:
    """Root-mean-square norm in float32 (Zhang and Sennrich 2019); `offset` scales by `1 + w`."""
    x = x.astype(jnp.float32)
    scale = weight.astype(jnp.float32) + (1.0 if offset else 0.0)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float32[np.ndarray, " half"]:
    """Rotary angular frequencies, in radians a position (Su et al. 2021).

    Computed in float32, as the reference implementations do, but for the power: that of float32
    is off by what the host's processor makes of it. `llama3` scaling follows the reference code
    published with Llama 3.1.
    """
    powers = np.float64(theta) ** (np.arange(0, head_dim, 2) / head_dim)
    frequencies: np.ndarray = np.float32(1.0) / powers.astype(np.float32)
    if scaling is None:
        return frequencies
    slow = frequencies / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * frequencies / np.float32(2 * np.pi)
    blend = np.clip((turns - low) / np.float32(high - low), 0, 1)
    blended: np.ndarray = ((1 - blend) * slow + blend * frequencies).astype(np.float32)
    return blended


def rotary_turns(
    positions: Int[Array, "b t"], frequencies: Float32[np.ndarray, "kinds half"]
) -> tuple[Float32[Array, "kinds b t half"], Float32[Array, "kinds b t half"]]:
    """Cosines and sines of every position's angles, for some sets of frequencies."""
    angles = jnp.expand_dims(positions.astype(jnp.float32), 2) * frequencies[:, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b t heads h"],
    cos: Float32[Array, "b t half"],
    sin: Float32[Array, "b t half"],
) -> Float[Array, "b t heads h"]:
    """Turns each pair `(x[i], x[i + h/2])` by its angle, in float32."""
    cos, sin = jnp.expand_dims(cos, 2), jnp.expand_dims(sin, 2)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def softcap(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)`, or `x` without a cap (Gemma 2)."""
    return x if cap is None else jnp.tanh(x / cap) * cap
