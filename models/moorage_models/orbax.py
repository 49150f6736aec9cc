"""Orbax checkpoints: reads what a tree says of itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import zstandard

from moorage_models.dtypes import ITEM_BYTES
from moorage_models.errors import ModelError, Reason
from moorage_models.headers import read_json
from moorage_models.layouts import StoredArray
from moorage_models.ocdbt import MANIFEST, require_bounded
from moorage_models.regular_files import below
from moorage_models.sources import Repository
from moorage_models.sources.source import within
from moorage_models.zarr_chunks import ChunkedTree

#: The file by which Orbax marks a checkpoint.
MARK = "_METADATA"

#: Orbax's kinds of leaves that are arrays; others are empty, strings or single numbers.
_ARRAYS = ("jax.Array", "np.ndarray")


def read_tree(repository: Repository, folder: str) -> dict[str, StoredArray]:
    """The arrays of an Orbax checkpoint on this machine, by their paths joined with `/`.

    Not by Orbax, which takes an array's name for a path that may lead anywhere. What stands before
    `token_embedder` or `decoder` in a path, a `transformer` at its beginning and a `value` at its
    end depend on who exported the checkpoint, and are left out of the keys.

    Args:
        repository: Where it is.
        folder: Its folder there.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if its metadata cannot be read; CHECKPOINT_UNSUPPORTED if
            folders in it are links.
    """
    assert repository.local is not None
    _require_own_files(repository, folder)
    said = read_json(repository, _name(folder, MARK)).get("tree_metadata")
    try:
        paths = list(_paths(said))
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        raise ModelError(
            Reason.CHECKPOINT_CORRUPT, f"{repository.label} is not a whole Orbax checkpoint"
        ) from error
    arrays = ChunkedTree(repository.local / folder).describe(paths)
    return {_key(array.path): array for array in arrays if array.dtype in ITEM_BYTES}


def _require_own_files(repository: Repository, folder: str) -> None:
    """Refuses what tensorstore would follow or take into memory as a whole."""
    assert repository.local is not None
    for path in below(repository.local / folder):
        if os.path.islink(path) and os.path.isdir(path):
            raise ModelError(
                Reason.CHECKPOINT_UNSUPPORTED,
                f"{path.name} in the Orbax checkpoint of {repository.label} is a link to a folder: "
                "put the folder itself there",
            )
    if _name(folder, MANIFEST) not in repository.files:
        return
    try:
        require_bounded(repository.local / folder)
    except (ValueError, LookupError, OverflowError, zstandard.ZstdError) as error:
        raise ModelError(
            Reason.CHECKPOINT_CORRUPT,
            f"the database of {repository.label} in {MANIFEST} cannot be read",
        ) from error


def _name(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _paths(said: Any) -> Iterator[tuple[str, ...]]:
    """The paths of the arrays that the metadata names."""
    for entry in said.values():
        path = tuple(str(key["key"]) for key in entry["key_metadata"])
        value = entry["value_metadata"]
        # Moments have the parameters' names.
        if value["value_type"] not in _ARRAYS or value.get("skip_deserialize"):
            continue
        if path[0] != "opt_state":
            if not within(".".join(path)):
                raise ValueError("an array's name leads out of the checkpoint")
            yield path


def _key(path: Sequence[str]) -> str:
    parts = "/".join(path[:-1] if path[-1] == "value" else path).split("/")
    starts = [i for i, part in enumerate(parts) if part in ("token_embedder", "decoder")]
    if starts:
        parts = parts[starts[0] :]
    return "/".join(parts[1:] if parts[0] == "transformer" else parts)
