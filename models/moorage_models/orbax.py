"""Orbax checkpoints: reads a tree's metadata, and restores its arrays onto the mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from moorage_models.config import ModelConfig
from moorage_models.dtypes import ITEM_BYTES, numpy_dtype
from moorage_models.errors import ModelError, Reason
from moorage_models.layouts import FOLDS, PARTS, ArrayPiece, Row, StoredArray, stored_letters
from moorage_models.monitor import LoadMonitor
from moorage_models.ops import partition
from moorage_models.plan import Plan, PlannedParameter

#: Bytes of stored arrays that are on the devices beside the model at a time.
_WINDOW_BYTES = 256 << 20


def read_tree(folder: Path, label: str) -> dict[str, StoredArray]:
    """The arrays of an Orbax checkpoint, by their paths joined with `/`.

    What stands before `token_embedder` or `decoder` in a path, a `transformer` at its beginning
    and a `value` at its end depend on who exported the checkpoint, and are left out of the keys.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if Orbax cannot read the tree's metadata.
    """
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
    except Exception as error:  # Orbax raises whatever its parts raise
        raise ModelError(
            Reason.CHECKPOINT_CORRUPT, f"{label} is not a whole Orbax checkpoint"
        ) from error
    return {
        _key(path): StoredArray(path, str(leaf.dtype), tuple(leaf.shape))
        for path, leaf in _leaves(tree)
        if path[0] != "opt_state"  # moments have the parameters' names
        and getattr(leaf, "shape", None) is not None
        and str(leaf.dtype) in ITEM_BYTES
    }


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _leaves(child, (*path, str(name)))
    else:
        yield path, tree


def _key(path: Sequence[str]) -> str:
    parts = "/".join(path[:-1] if path[-1] == "value" else path).split("/")
    starts = [i for i, part in enumerate(parts) if part in ("token_embedder", "decoder")]
    if starts:
        parts = parts[starts[0] :]
    return "/".join(parts[1:] if parts[0] == "transformer" else parts)


def place_tree(
    plan: Plan[ArrayPiece], folder: Path, mesh: Mesh, monitor: LoadMonitor
) -> dict[str, jax.Array]:
    """Restores a plan's arrays straight onto the mesh, a window at a time, into the stacks.

    Args:
        plan: From `plan_tree`.
        folder: The Orbax checkpoint.
        mesh: The device mesh, axes Auto.
        monitor: Told of the bytes of the stage `place`.

    Raises:
        ModelError: CHECKPOINT_CORRUPT; LOAD_CANCELLED.
    """
    users: dict[StoredArray, list[tuple[PlannedParameter[ArrayPiece], ArrayPiece]]] = {}
    for parameter in plan.parameters:
        for piece in parameter.pieces:
            users.setdefault(piece.tensor, []).append((parameter, piece))
    monitor.expect("place", sum(tensor.nbytes for tensor in users))
    params = {p.name: _empty(p, mesh) for p in plan.parameters}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for window in _windows(users):
            monitor.check()
            restored = _restore(checkpointer, folder, window, mesh)
            for tensor, value in zip(window, restored, strict=True):
                for parameter, piece in users[tensor]:
                    layers = jnp.array(piece.layers, jnp.int32)
                    how = (piece.row, piece.scanned, plan.config)
                    params[parameter.name] = _fill(params[parameter.name], value, layers, how)
                monitor.advance("place", tensor.nbytes)
    return params


def _windows(tensors: Iterable[StoredArray]) -> Iterator[list[StoredArray]]:
    window: list[StoredArray] = []
    for tensor in tensors:
        if window and sum(t.nbytes for t in window) + tensor.nbytes > _WINDOW_BYTES:
            yield window
            window = []
        window.append(tensor)
    yield window


def _restore(
    checkpointer: ocp.Checkpointer, folder: Path, window: Sequence[StoredArray], mesh: Mesh
) -> list[jax.Array]:
    item: dict[str, Any] = {}
    for tensor in window:
        node = item
        for part in tensor.path[:-1]:
            node = node.setdefault(part, {})
        sharding = NamedSharding(mesh, _spread(tensor.shape, mesh))
        dtype = numpy_dtype(tensor.dtype)
        node[tensor.path[-1]] = jax.ShapeDtypeStruct(tensor.shape, dtype, sharding=sharding)
    arguments = ocp.checkpoint_utils.construct_restore_args(item)
    try:
        tree = checkpointer.restore(
            folder,
            ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True),
        )
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise ModelError(
            Reason.CHECKPOINT_CORRUPT, f"array {'/'.join(window[0].path)} cannot be read"
        ) from error
    return [_at(tree, tensor.path) for tensor in window]


def _at(tree: Any, path: Sequence[str]) -> jax.Array:
    for part in path:
        tree = tree[part]
    array: jax.Array = tree
    return array


def _spread(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Splits a stored array over all devices along the first axis that they divide."""
    ways = math.prod(mesh.shape.values())
    for axis, size in enumerate(shape):
        if ways > 1 and size % ways == 0:
            return PartitionSpec(*(None,) * axis, tuple(mesh.axis_names))
    return PartitionSpec()


def _empty(parameter: PlannedParameter[ArrayPiece], mesh: Mesh) -> jax.Array:
    sharding = NamedSharding(mesh, partition(parameter.spec(dict(mesh.shape))))
    zeros = partial(jnp.zeros, parameter.shape, numpy_dtype(parameter.dtype))
    array: jax.Array = jax.jit(zeros, out_shardings=sharding)()
    return array


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _fill(stack: Array, stored: Array, layers: Array, how: tuple[Row, bool, ModelConfig]) -> Array:
    """Writes a stored array into its layers of a parameter, or all of it."""
    row, scanned, config = how
    value = _ours(stored, row, config, scanned=scanned).astype(stack.dtype)
    if not layers.size:
        return value[: stack.shape[0]]
    return stack.at[layers].set(value if scanned else value[None])


def _ours(x: Array, row: Row, config: ModelConfig, *, scanned: bool) -> Array:
    """A stored array with our axes and values, `[layers, ...]` if scanned."""
    letters = stored_letters(row, scanned=scanned)
    if row.select is not None:
        x = jnp.take(x, row.select, axis=letters.index("S"))
        letters.remove("S")
    if row.part:
        letter, start, stop = PARTS[row.part](config)
        x = jax.lax.slice_in_dim(x, start, stop, axis=letters.index(letter))
    if row.interleaved:
        axis = letters.index("H")
        pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
        x = jnp.swapaxes(pairs, axis, axis + 1).reshape(x.shape)
    if row.fold:
        x = FOLDS[row.fold](x.astype(jnp.float32), config)
    sizes = dict(zip(letters, x.shape, strict=True))
    groups = [["L"]] * scanned + row.wanted
    order = [letters.index(letter) for group in groups for letter in group]
    return x.transpose(order).reshape([math.prod(sizes[i] for i in group) for group in groups])
