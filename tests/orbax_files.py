"""Golden checkpoints from safetensors files, and trees of arrays into Orbax checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401 - without it the safetensors library knows no bfloat16
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import DTypeLike
from orbax.checkpoint import v1
from safetensors import safe_open

from orbax_tables import FAMILIES, FORMS, Family

Arrays = dict[str, np.ndarray]
Tree = dict[str, Any]


@dataclass(frozen=True)
class Golden:
    """A golden folder, read by the safetensors library.

    Attributes:
        config: The configuration of the text model.
        family: What becomes of its tensors.
        text: Tensors, named from `embed_tokens.weight`, `layers.0.` and `norm.weight` on; a head
            is there only if it is not the embedding.
        vision: Tensors of the vision tower and the projector, under their own names.
    """

    config: Mapping[str, Any]
    family: Family
    text: Arrays
    vision: Arrays

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def sizes(self) -> dict[str, int]:
        width, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        head_dim = self.config.get("head_dim") or width // heads
        return {"E": width, "D": head_dim, "M": self.config.get("moe_intermediate_size", 0)}

    def layer(self, index: int) -> Arrays:
        """A layer's tensors, transposed; those of all experts in one stack, experts first."""
        start = f"layers.{index}."
        layer = {n.removeprefix(start): a.T for n, a in self.text.items() if n.startswith(start)}
        if "mlp.gate.weight" in layer:
            experts = range(self.config["num_experts"])
            for part in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
                each = [layer.pop(f"mlp.experts.{expert}.{part}") for expert in experts]
                layer[f"mlp.experts.{part}"] = np.stack(each)
        return layer


def read_golden(folder: Path, dtype: DTypeLike | None = None) -> Golden:
    """A folder's tensors, in `dtype`, or as they are stored."""
    tensors: Arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if dtype is not None:
        tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    config = json.loads((folder / "config.json").read_text())
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    root = embedding.removesuffix("embed_tokens.weight")
    vision = {n: a for n, a in tensors.items() if "vision_tower" in n or "multi_modal" in n}
    text = {n.removeprefix(root): a for n, a in tensors.items() if n not in vision}
    if np.array_equal(text.get("lm_head.weight", 0), tensors[embedding]):
        del text["lm_head.weight"]
    family = FAMILIES[config["architectures"][0]]
    return Golden(config.get("text_config", config), family, text, vision)


def nest(arrays: Mapping[str, Any]) -> Tree:
    """A tree of paths with slashes."""
    tree: Tree = {}
    for path, array in arrays.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return tree


def resize(table: np.ndarray, rows: int | None) -> np.ndarray:
    """Cuts rows off, or adds rows of zeros; None changes nothing."""
    if rows is None:
        return table
    padding = max(rows - len(table), 0)
    return np.pad(table[:rows], ((0, padding), (0, 0)))


def shard(array: np.ndarray, devices: int) -> jax.Array:
    """Over the first of the two leading axes that the number of devices divides, else over none."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("checkpoint_sharding_axis",))
    axes = [axis for axis in range(min(2, array.ndim)) if array.shape[axis] % devices == 0]
    spec = [None] * axes[0] + ["checkpoint_sharding_axis"] if axes else []
    sharded: jax.Array = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    return sharded


def save_tree(path: Path, tree: Tree, ocdbt: bool, zarr3: bool) -> None:
    """Saves a tree as a checkpoint without steps or items, as Orbax v0 does."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.absolute(), tree)


def save_form(
    out: Path, form: str, tree: Tree, ocdbt: bool, zarr3: bool, metadata: Mapping[str, Any]
) -> Path:
    """Saves a tree in one of MaxText's forms; returns what a user gives as the path."""
    step, item = FORMS[form].step, FORMS[form].item
    if not step and out.exists():
        out.rmdir()  # Orbax wants to create it
    if form == "D":
        save_tree(out, tree, ocdbt, zarr3)
    elif form in ("A", "B"):
        handlers = {item: ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)}
        options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
        with ocp.CheckpointManager(
            out.absolute(), options=options, item_names=(item,), item_handlers=handlers
        ) as manager:
            items = ocp.args.Composite(**{item: ocp.args.PyTreeSave(tree)})
            manager.save(int(step), args=items, custom_metadata=dict(metadata))
    else:
        context = v1.Context()
        context.array.saving.use_ocdbt = ocdbt
        context.array.saving.use_zarr3 = zarr3
        with context:
            v1.save_checkpointables((out / step).absolute(), {item: tree})
    return out / FORMS[form].given
