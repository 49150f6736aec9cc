"""The head: from hidden states to what is asked of them, one chunk of tokens after another."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from moorage_models.config import ModelConfig
from moorage_models.ops import Linear, contract, partition, softcap
from moorage_models.parameters import PARAMETERS, head_parameter
from moorage_models.sharding import FSDP, TP, storage_spec
from moorage_server.engine.outputs import OUTPUTS, Logits, Profile

#: Tokens of a chunk on each data-parallel device: no program holds the logits of more.
CHUNK = 128

_MIN_BLOCK, _MAX_BLOCK = 256, 1024


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
    logits = Logits.of(
        values,
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

    Each tensor-parallel device makes those of its own rows of the table, in float32 and in blocks,
    which are gathered and cast: no program holds another copy of the table, and the products have
    the same shape on any number of data-parallel devices, whose bits would differ else. Without a
    cap the hidden states are divided.
    """
    name, linear = head_parameter(config), Linear(config, mesh)
    table, cap = params[name], config.final_softcap
    if config.num_labels:
        return linear.project(hidden, name, table)
    if cap is None:
        hidden = hidden / jnp.expand_dims(temperatures, 2)
    stored = storage_spec(PARAMETERS[name].axes, table.shape, dict(mesh.shape))
    gathered = FSDP in stored[0]

    def own(
        hidden: Float32[Array, "s c d"],
        temperatures: Float32[Array, "s c"],
        table: Float[Array, "o d"],
    ) -> Float32[Array, "s c v"]:
        count, ways = len(table), mesh.shape[FSDP] if gathered else 1
        rows = min(max(1, block_rows(count * ways, config.embed_dim) // ways), count)

        def add_block(i: Array, logits: Array) -> Array:
            start = jnp.minimum(i * rows, count - rows)  # the last begins early, to be as large
            block = jax.lax.dynamic_slice_in_dim(table, start, rows)
            block = jax.lax.all_gather(block, FSDP, tiled=True) if gathered else block
            values = contract("scd,vd->scv", hidden, block.astype(jnp.float32), jnp.float32)
            if cap is not None:
                values = softcap(values, cap) / jnp.expand_dims(temperatures, 2)
            values = values.reshape(*logits.shape[:3], rows)
            return jax.lax.dynamic_update_slice_in_dim(logits, values, start, axis=3)

        room = jnp.empty((*hidden.shape[:2], ways, count), jnp.float32)
        logits: Array = jax.lax.fori_loop(0, -(-count // rows), add_block, room)
        return logits.reshape(*hidden.shape[:2], -1)

    by_rows, by_table = linear.batch_spec(hidden), partition(stored)
    logits: Array = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(by_rows, by_rows, by_table),
        out_specs=PartitionSpec(*by_rows, None, TP if TP in stored[0] else None),
        check_vma=False,  # of a table that no axis splits
    )(hidden, temperatures, table)
    return logits


def block_rows(outputs: int, width: int) -> int:
    """Rows of a block of the table: an eighth of a chunk's logits in bytes, if that is some.

    Args:
        outputs: The vocabulary's part of a tensor-parallel device.
        width: The embedding's width.
    """
    rows = CHUNK * outputs // (8 * width)
    return min(max(rows, _MIN_BLOCK), _MAX_BLOCK) // 64 * 64
