"""Finds an Orbax checkpoint, tells its layout, and plans its load."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from moorage_models.config import ModelConfig
from moorage_models.dtypes import ITEM_BYTES
from moorage_models.errors import ModelError, Reason
from moorage_models.families import flax, maxtext
from moorage_models.layouts import (
    ArrayPiece,
    Layout,
    Place,
    Row,
    StoredArray,
    stored_letters,
    stored_sizes,
)
from moorage_models.naming import ModelNaming
from moorage_models.orbax import MARK, read_tree
from moorage_models.parameters import LAYERS, parameter_shapes
from moorage_models.plan import Plan, PlannedParameter
from moorage_models.sources import ModelRequest, Repository


def find_orbax(repository: Repository) -> str | None:
    """Where in a repository an Orbax checkpoint is; None if it holds safetensors or nothing.

    A path may name the checkpoint itself or what holds it: beside a tokenizer, or under a training
    run's steps, of which the last is meant.

    Raises:
        ModelError: INVALID_REQUEST if there are several that are not steps of one run.
    """
    if any(name.endswith(".safetensors") and "/" not in name for name in repository.files):
        return None
    folders = {str(PurePosixPath(n).parent) for n in repository.files if n.split("/")[-1] == MARK}
    if len(folders) > 1 and all(_step(folder) is not None for folder in folders):
        folders = {max(folders, key=lambda folder: _step(folder) or 0)}
    if len(folders) > 1:
        raise ModelError(
            Reason.INVALID_REQUEST,
            f"{repository.label} holds several Orbax checkpoints: {', '.join(sorted(folders))}; "
            "give one of them as model_path",
        )
    return next(iter(folders), None)


def _step(folder: str) -> int | None:
    match = re.fullmatch(r"(\d+)(/\w+)?", folder)
    return int(match[1]) if match else None


def open_tree(
    repository: Repository,
    folder: str,
    config: ModelConfig,
    naming: ModelNaming | None,
    request: ModelRequest,
) -> Plan[ArrayPiece]:
    """Plans the load of an Orbax checkpoint on this machine, told by looking: Flax or MaxText.

    Raises:
        ModelError: CHECKPOINT_UNSUPPORTED if the family has no such layout; INVALID_REQUEST if the
            checkpoint does not tell enough; CHECKPOINT_CORRUPT; CHECKPOINT_MISMATCH.
    """
    tree = read_tree(repository, folder)
    options = dict(request.options)
    if unknown := sorted(set(options) - set(maxtext.OPTIONS)):
        raise ModelError(
            Reason.INVALID_REQUEST,
            f"unknown options {', '.join(unknown)}; known are {', '.join(maxtext.OPTIONS)}",
        )
    layout = flax.LAYOUTS.get(config.family)
    if "embedder/input_embedding" not in tree:
        layout = maxtext.choose(config, naming.model_family if naming else "", options)
    if layout is None or config.num_labels:
        raise ModelError(
            Reason.CHECKPOINT_UNSUPPORTED,
            f"{config.family} has no Orbax tree of this kind; load it from safetensors",
        )
    table = tree.get(layout.rows["embed"][0].key)
    if table and table.shape[0] < config.vocab_size:
        config = replace(config, vocab_size=table.shape[0])  # stored without its padding rows
    files = tree_files(repository, folder)
    return replace(plan_tree(config, tree, layout, request.dtype), files=files)


def tree_files(repository: Repository, folder: str) -> tuple[str, ...]:
    """The files of the Orbax checkpoint in a folder of a repository."""
    return tuple(n for n in repository.files if folder == "." or n.startswith(f"{folder}/"))


def plan_tree(
    config: ModelConfig, tree: Mapping[str, StoredArray], layout: Layout, dtype: str = ""
) -> Plan[ArrayPiece]:
    """Matches every parameter of `config` with arrays of a tree.

    Raises:
        ModelError: CHECKPOINT_MISMATCH with every misfit.
    """
    misfits: list[str] = []
    used: set[str] = set()
    parameters = []
    for name, shape in parameter_shapes(config).items():
        pieces = tuple(_pieces(name, config, tree, layout, misfits))
        used |= {"/".join(piece.tensor.path) for piece in pieces}
        stored = max((piece.tensor.dtype for piece in pieces), key=_width, default="float32")
        parameters.append(PlannedParameter(name, shape, dtype or stored, pieces))
    left = [key for key, leaf in tree.items() if "/".join(leaf.path) not in used]
    misfits += [f"no parameter for array {key}" for key in left if _is_parameter(key)][:20]
    if misfits:
        raise ModelError(
            Reason.CHECKPOINT_MISMATCH,
            f"the {layout.name} checkpoint does not fit the {config.family} config:\n"
            + "\n".join(misfits),
        )
    parameters.sort(key=lambda p: -math.prod(p.shape))
    return Plan(config, tuple(parameters))


def _width(dtype: str) -> int:
    return ITEM_BYTES[dtype]


def _is_parameter(key: str) -> bool:
    """A MaxText checkpoint holds the optimizer's state too, a multimodal one a vision tower."""
    return key.startswith(("decoder/", "token_embedder/", "layer_", "final_norm"))


def _pieces(
    name: str,
    config: ModelConfig,
    tree: Mapping[str, StoredArray],
    layout: Layout,
    misfits: list[str],
) -> Iterator[ArrayPiece]:
    """A parameter's arrays; misfits are told once a parameter."""
    rows = layout.rows.get(name, ())
    if not name.startswith(LAYERS):
        found = _match(config, tree, ((row.key, row, None) for row in rows))
        if found is None:
            misfits.append(_misfit(name, [row.key for row in rows], tree))
        else:
            yield ArrayPiece(found[0], found[1])
        return
    held: dict[str, list[tuple[int, int]]] = {}
    of_key: dict[str, tuple[StoredArray, Row, Place]] = {}
    for layer in range(config.num_layers):
        places = list(layout.places(layer, config.num_layers))
        options = [(place.key(row), row, place) for place in places for row in rows]
        found = _match(config, tree, options)
        if found is None:
            misfits.append(_misfit(name, [key for key, _, _ in options], tree))
            return
        tensor, row, place = found
        assert place is not None
        of_key[place.key(row)] = (tensor, row, place)
        held.setdefault(place.key(row), []).append((place.index or 0, layer))
    for key, layers in held.items():
        tensor, row, place = of_key[key]
        scanned = place.index is not None
        if scanned and tensor.shape[1] != len(layers):
            misfits.append(_misfit(name, [key], tree))
        yield ArrayPiece(tensor, row, tuple(layer for _, layer in sorted(layers)), scanned)


def _match(
    config: ModelConfig,
    tree: Mapping[str, StoredArray],
    options: Iterable[tuple[str, Row, Place | None]],
) -> tuple[StoredArray, Row, Place | None] | None:
    for key, row, place in options:
        tensor = tree.get(key)
        if tensor and _fits(tensor.shape, row, config, place):
            return tensor, row, place
    return None


def _fits(shape: tuple[int, ...], row: Row, config: ModelConfig, place: Place | None) -> bool:
    letters = stored_letters(row, scanned=place is not None and place.index is not None)
    sizes = stored_sizes(config)
    longer = {"V": sizes["V"], "S": (row.select or 0) + 1}  # axes that may be so long or longer
    return len(shape) == len(letters) and all(
        size >= longer[letter] if letter in longer else sizes.get(letter, size) == size
        for letter, size in zip(letters, shape, strict=True)
    )


def _misfit(name: str, keys: list[str], tree: Mapping[str, StoredArray]) -> str:
    for key in keys:
        if key in tree:
            return f"{name}: array {key} has shape {list(tree[key].shape)}, which does not fit"
    return f"{name}: no array {keys[0] if keys else 'is known for it in this layout'}"
