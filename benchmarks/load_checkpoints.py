"""Makes the checkpoints of the load benchmark: real geometries, random weights, once.

    python benchmarks/load_checkpoints.py --scale 0.1      prints a folder a line

The weights are one block of random bfloat16 numbers over and over, the same every time. They do
not compress better than real ones: the block is longer than a compressor looks back.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path.home() / ".cache" / "moorage" / "bench"
_BLOCK = 16_777_259  # values; a prime number, so that no two tensors start alike

Shapes = dict[str, tuple[int, ...]]

#: Dimensions by the keys of `config.json`; a number stands for itself.
_SIZES: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "V": lambda c: c["vocab_size"],
    "E": lambda c: c["hidden_size"],
    "D": lambda c: c["head_dim"],
    "N": lambda c: c["num_attention_heads"],
    "G": lambda c: c["num_key_value_heads"],
    "Q": lambda c: c["num_attention_heads"] * c["head_dim"],
    "K": lambda c: c["num_key_value_heads"] * c["head_dim"],
    "F": lambda c: c["intermediate_size"],
    "X": lambda c: c["num_experts"],
    "M": lambda c: c["moe_intermediate_size"],
}

# fmt: off
_ATTENTION = {
    "input_layernorm.weight": "E", "post_attention_layernorm.weight": "E",
    "self_attn.q_proj.weight": "Q E", "self_attn.k_proj.weight": "K E",
    "self_attn.v_proj.weight": "K E", "self_attn.o_proj.weight": "E Q",
    "self_attn.q_norm.weight": "D", "self_attn.k_norm.weight": "D",
}
_MLP = {"gate_proj.weight": "F E", "up_proj.weight": "F E", "down_proj.weight": "E F"}
_EXPERT = {"gate_proj.weight": "M E", "up_proj.weight": "M E", "down_proj.weight": "E M"}
_FLAX_LAYER = {
    "attn/q_einsum/w": "N E D", "attn/kv_einsum/w": "2 G E D", "attn/attn_vec_einsum/w": "N D E",
    "attn/_query_norm/scale": "D", "attn/_key_norm/scale": "D",
    "mlp/gating_einsum/w": "2 F E", "mlp/linear/w": "F E",
    "pre_attention_norm/scale": "E", "post_attention_norm/scale": "E",
    "pre_ffw_norm/scale": "E", "post_ffw_norm/scale": "E",
}
# fmt: on


@dataclass(frozen=True)
class Recipe:
    """A checkpoint to make.

    Attributes:
        config: What `config.json` says at scale 1.
        cuts: The keys that a scale multiplies, and what they stay multiples of.
        names: The tensors of a config, and their dimensions.
        shards: Number of safetensors files; 0 makes an Orbax checkpoint.
    """

    config: Mapping[str, Any]
    cuts: Mapping[str, int]
    names: Callable[[Mapping[str, Any]], dict[str, str]]
    shards: int

    def cut(self, scale: float) -> dict[str, Any]:
        """The configuration at a scale of at most 1."""
        small = {k: max(1, round(self.config[k] * scale / of)) * of for k, of in self.cuts.items()}
        return {**self.config, **(small if scale < 1 else {})}

    def shapes(self, scale: float) -> Shapes:
        """Every tensor's shape."""
        config = self.cut(scale)
        sizes = {letter: int(size(config)) for letter, size in _SIZES.items() if _has(size, config)}
        return {
            name: tuple(sizes[d] if d in sizes else int(d) for d in dims.split())
            for name, dims in self.names(config).items()
        }

    def nbytes(self, scale: float) -> int:
        """Bytes of all tensors in bfloat16."""
        return 2 * sum(map(math.prod, self.shapes(scale).values()))


def _has(size: Callable[[Mapping[str, Any]], int], config: Mapping[str, Any]) -> bool:
    try:
        return size(config) > 0
    except KeyError:
        return False


def _hugging_face(config: Mapping[str, Any]) -> dict[str, str]:
    layer = dict(_ATTENTION)
    if "num_experts" in config:
        layer["mlp.gate.weight"] = "X E"
        for expert in range(config["num_experts"]):
            layer |= {f"mlp.experts.{expert}.{name}": dims for name, dims in _EXPERT.items()}
    else:
        layer |= {f"mlp.{name}": dims for name, dims in _MLP.items()}
    names = {"model.embed_tokens.weight": "V E"}
    for index in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{index}.{name}": dims for name, dims in layer.items()}
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": "V E"}
    return {**names, "model.norm.weight": "E", **head}


def _flax(config: Mapping[str, Any]) -> dict[str, str]:
    names = {"transformer/embedder/input_embedding": "V E", "transformer/final_norm/scale": "E"}
    for index in range(config["num_hidden_layers"]):
        names |= {f"transformer/layer_{index}/{name}": dims for name, dims in _FLAX_LAYER.items()}
    return names


_QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16",
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
    "num_hidden_layers": 14, "num_attention_heads": 16, "num_key_value_heads": 8,
    "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
    "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
_EXPERTS = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 32_768,
    "hidden_size": 1024, "num_hidden_layers": 3, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 384, "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
_GEMMA3 = {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262_144,
    "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "head_dim": 256,
    "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 32_768,
    "sliding_window": 512, "tie_word_embeddings": True,
}  # fmt: skip

#: By the id that each is loaded under, which is its folder's name too. Gemma 3 1B is whole.
_DENSE_CUTS = {"num_hidden_layers": 1, "vocab_size": 64}
RECIPES: Mapping[str, Recipe] = {
    "qwen3-1.7b-half": Recipe(_QWEN3, _DENSE_CUTS, _hugging_face, shards=4),
    "qwen3-experts": Recipe(
        {**_QWEN3, **_EXPERTS},
        {"moe_intermediate_size": 8, "vocab_size": 64},
        _hugging_face,
        shards=2,
    ),
    "gemma-3-1b-it": Recipe(_GEMMA3, _DENSE_CUTS, _flax, shards=0),
}


def make(name: str, scale: float = 1.0, root: Path = FOLDER) -> Path:
    """The folder of a checkpoint, which is made if it is not there."""
    folder, recipe = root / f"{scale:g}" / name, RECIPES[name]
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shapes = recipe.shapes(scale)
    if recipe.shards:
        _write_shards(partial, shapes, recipe.shards)
    else:
        _write_orbax(partial / name, shapes)
    if recipe.shards or scale < 1:  # one download from Kaggle has none: the id tells
        (partial / "config.json").write_text(json.dumps(recipe.cut(scale), indent=1))
    os.sync()
    partial.rename(folder)
    return folder


@cache
def _block() -> np.ndarray:
    """Normal numbers as the upper halves of their float32 bits, which are bfloat16."""
    numbers = np.random.default_rng(0).standard_normal(_BLOCK, np.float32) * np.float32(0.02)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def _values(start: int, count: int) -> Iterator[np.ndarray]:
    """The numbers from `start` on, in pieces."""
    while count:
        piece = _block()[start % _BLOCK :][:count]
        yield piece
        start, count = start + len(piece), count - len(piece)


def _write_shards(folder: Path, shapes: Shapes, shards: int) -> None:
    """Files of about one size; in a file the tensors are in the order of their names."""
    total, before = 2 * sum(map(math.prod, shapes.values())), 0
    files: list[Shapes] = [{} for _ in range(shards)]
    for name, shape in shapes.items():
        files[before * shards // total][name] = shape
        before += 2 * math.prod(shape)
    index: dict[str, str] = {}
    for number, held in enumerate(files, start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        _write_safetensors(folder / file, {name: held[name] for name in sorted(held)}, number)
        index |= dict.fromkeys(held, file)
    said = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(said))


def _write_safetensors(path: Path, shapes: Shapes, start: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in _values(start, end // 2):
            file.write(piece.data)


def _write_orbax(path: Path, shapes: Shapes) -> None:
    """As on Kaggle: flat keys with slashes, one host, a chunk an array, a tokenizer beside it."""
    import ml_dtypes
    import orbax.checkpoint as ocp

    tree: dict[str, dict[str, np.ndarray]] = {}
    start = 0
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition("/")
        numbers = np.concatenate(list(_values(start, math.prod(shape))))
        tree.setdefault(module, {})[leaf] = numbers.view(ml_dtypes.bfloat16).reshape(shape)
        start += math.prod(shape)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.absolute(), tree)
    path.with_name("tokenizer.model").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the layers and rows")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    for name, recipe in RECIPES.items():
        folder = make(name, args.scale, args.folder)
        print(f"{folder}  {recipe.nbytes(args.scale) / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
