"""Orbax checkpoints: reads what a tree says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from moorage_models.dtypes import ITEM_BYTES
from moorage_models.errors import ModelError, Reason
from moorage_models.layouts import StoredArray

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
