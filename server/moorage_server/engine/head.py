"""The head: from hidden states to what is asked of them, one chunk of tokens after another."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32

from moorage_models.config import ModelConfig
from moorage_models.ops import Linear, softcap
from moorage_models.parameters import head_parameter
from moorage_models.sharding import TP
from moorage_server.engine.outputs import OUTPUTS, Logits, Profile

#: Tokens of a chunk on each data-parallel device: no program holds the logits of more.
CHUNK = 128

_CAPPED_ROWS = 8  # rows that are capped at a time


def head(
    params: Mapping[str, Array],
    hidden: Float32[Array, "s c d"],
    targets: Int32[Array, "s c"],
    temperatures: Float32[Array, "s c"],
    candidates: Int32[Array, "s c n"],
    *,
    profile: Profile,
    config: ModelConfig,
    mesh: Mesh,
) -> dict[str, Array]:
    """The tensors of a profile for one chunk, each `[s, c, ...]`.

    Args:
        params: The head's parameter.
        hidden: Hidden states; the first axis is split over data-parallel devices.
        targets: The token that is asked about.
        temperatures: The logits are divided by these; 1 for labels.
        candidates: Other tokens that are asked about.
        profile: What to compute.
        config: The configuration.
        mesh: The device mesh, axes Auto.
    """
    names = [name for output in profile.outputs for name in OUTPUTS[output].tensors]
    computes = [OUTPUTS[output].compute for output in profile.outputs]
    if None in computes:
        return dict(zip(names, [hidden], strict=True))
    values = scaled_logits(params, hidden, temperatures, config=config, mesh=mesh)
    linear = Linear(config, mesh)
    split = PartitionSpec(*linear.batch_spec(values), None, TP if linear.on_tp("v") else None)
    logits = Logits(
        values,
        jax.nn.logsumexp(values, axis=-1),
        targets,
        candidates,
        min(profile.size, values.shape[-1]),
        NamedSharding(mesh, split),
    )
    tensors = [tensor for compute in computes if compute for tensor in compute(logits)]
    return dict(zip(names, tensors, strict=True))


def scaled_logits(
    params: Mapping[str, Array],
    hidden: Float32[Array, "s c d"],
    temperatures: Float32[Array, "s c"],
    *,
    config: ModelConfig,
    mesh: Mesh,
) -> Float32[Array, "s c v"]:
    """Logits divided by a temperature, or a reward model's scores, in one buffer.

    Without a cap the hidden states are divided: a second array of the logits' size would take as
    much memory again.
    """
    name, linear = head_parameter(config), Linear(config, mesh)
    cap = None if config.num_labels else config.final_softcap
    if cap is None:
        return linear.project(hidden / temperatures[..., None], name, params[name])

    def capped(i: Array, values: Array) -> Array:
        start = i * _CAPPED_ROWS
        some = jax.lax.dynamic_slice_in_dim(values, start, _CAPPED_ROWS, axis=1)
        warmth = jax.lax.dynamic_slice_in_dim(temperatures, start, _CAPPED_ROWS, axis=1)
        some = softcap(some, cap) / warmth[..., None]
        return jax.lax.dynamic_update_slice_in_dim(values, some, start, axis=1)

    values = linear.project(hidden, name, params[name])
    done: Array = jax.lax.fori_loop(0, hidden.shape[1] // _CAPPED_ROWS, capped, values)
    return done
