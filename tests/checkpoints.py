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
from safetensors.numpy import save_file

from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.sources import ModelRequest, ModelSource

GOLDEN = Path(__file__).parent / "golden"
WIDTH = 512  # of checkpoints like those of a real size
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


def make_wide(folder: Path, name: str) -> Path:
    """Two random layers of a real width, as a checkpoint like that golden one."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 1536, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    sizes |= {"vocab_size": 3000, "max_position_embeddings": 8192}
    config = golden_config(name) | sizes | {"tie_word_embeddings": False}
    shapes = {
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
        "self_attn.q_proj": (512, WIDTH),
        "self_attn.k_proj": (256, WIDTH),
        "self_attn.v_proj": (256, WIDTH),
        "self_attn.o_proj": (WIDTH, 512),
        "mlp.gate_proj": (1536, WIDTH),
        "mlp.up_proj": (1536, WIDTH),
        "mlp.down_proj": (WIDTH, 1536),
    }
    if name.startswith("qwen3"):
        shapes |= {"self_attn.q_norm": (64,), "self_attn.k_norm": (64,)}
    layers = {f"model.layers.{i}.{name}": shape for i in (0, 1) for name, shape in shapes.items()}
    tables = {"model.embed_tokens": (3000, WIDTH), "lm_head": (3000, WIDTH), "model.norm": (WIDTH,)}
    rng = np.random.default_rng(11)
    tensors = {
        f"{name}.weight": (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)
        if len(shape) > 1
        else np.ones(shape, np.float32)
        for name, shape in {**layers, **tables}.items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder
