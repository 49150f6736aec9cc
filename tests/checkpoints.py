"""The golden checkpoints as the tests of several modules use them, and meshes to load them on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401 - without it the safetensors library knows no bfloat16
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.sources import ModelRequest, ModelSource

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))


def mesh_of(fsdp: int, tp: int) -> Mesh:
    devices = np.array(jax.devices()[: fsdp * tp]).reshape(fsdp, tp)
    return Mesh(devices, ("fsdp", "tp"))


def open_folder(folder: Path, dtype: str = "", compute_dtype: str = "") -> Checkpoint:
    """A folder's checkpoint, asked for under an id that follows no naming rule."""
    return open_checkpoint(
        ModelRequest(
            "tiny",
            ModelSource.INTERNAL,
            str(folder),
            dtype=dtype,
            compute_dtype=compute_dtype,
        )
    )


def golden_config(name: str) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((GOLDEN / name / "config.json").read_text())
    return loaded


def stored_tensors(folder: Path) -> Mapping[str, np.ndarray]:
    """Every tensor of a folder, read by the safetensors library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors
