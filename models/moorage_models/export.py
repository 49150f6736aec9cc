"""Writes a model as a Hugging Face folder: the weight tables, read backwards."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moorage_models.config import ModelConfig
from moorage_models.decoder import Decoder
from moorage_models.families import FAMILIES
from moorage_models.headers import INDEX
from moorage_models.hf_config import ACTIVATIONS, FIELDS, LAYER_KINDS
from moorage_models.layouts import fill_template
from moorage_models.plan import most_bytes

_SHARD_BYTES = 2 << 30


def save_pretrained(model: Decoder, folder: str | Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes `config.json` and safetensors that transformers loads.

    Every tensor has the bits of the parameter that it is a slice of. Host memory is that of one
    file. Of a multimodal checkpoint, the text decoder is written.

    Args:
        model: The model.
        folder: Where to; made if it is not there.
        shard_bytes: The most bytes of tensors in a file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_write_shards(model, folder, shard_bytes))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(names) == 1:
        names = ["model.safetensors"]
    for name, (partial, _) in zip(names, shards, strict=True):
        partial.replace(folder / name)
    if len(names) > 1:
        sizes = {tensor: size for _, held in shards for tensor, size in held.items()}
        weight_map = {t: n for n, (_, held) in zip(names, shards, strict=True) for t in held}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)
    totals = {name: (value.dtype.name, value.nbytes) for name, value in model.params.items()}
    _write_json(folder / "config.json", write_config(model.config, most_bytes(totals.values())))


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """What a `config.json` says of a config; `hf_config.read_config` reads it back.

    Args:
        config: The configuration.
        dtype: The dtype of most parameters.
    """
    family = FAMILIES[config.family]
    kind = "ForSequenceClassification" if config.num_labels else "ForCausalLM"
    architecture = next(
        name
        for name in family.architectures
        if name.endswith(kind) and ("Moe" in name) == (config.num_experts > 0)
    )
    raw: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": family.architectures[architecture],
        "torch_dtype": dtype,
        **{key: getattr(config, field) for key, field in FIELDS.items()},
        "rope_theta": config.rope_theta,
        "rope_scaling": _write_scaling(config),
    }
    raw |= _write_optional(config)
    if not config.num_experts:
        raw = {
            key: value for key, value in raw.items() if "expert" not in key and key[:4] != "moe_"
        }
        raw.pop("norm_topk_prob")
    return raw


def _write_optional(config: ModelConfig) -> dict[str, Any]:
    """Keys that only some families' files have."""
    family = FAMILIES[config.family]
    activation = next(hf for hf, ours in ACTIVATIONS.items() if ours == config.activation)
    raw: dict[str, Any] = {"hidden_act": activation}
    if "hidden_activation" in family.defaults:
        raw["hidden_activation"] = activation
    if "query_pre_attn_scalar" in family.defaults:
        scalar = config.query_scale**-2
        raw["query_pre_attn_scalar"] = round(scalar) if abs(scalar % 1 - 0.5) > 0.499 else scalar
    if "rope_local_base_freq" in family.defaults:
        raw["rope_local_base_freq"] = config.rope_local_theta
    if "sliding_window" in family.defaults:
        names = {kind: name for name, kind in LAYER_KINDS.items()}
        raw["sliding_window"] = config.window
        raw["layer_types"] = [names[kind] for kind in config.layer_kinds]
    if config.num_labels:
        raw["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
    return raw


def _write_scaling(config: ModelConfig) -> dict[str, Any] | None:
    if config.rope_scaling is None:
        return None
    scaling = asdict(config.rope_scaling)
    raw = {"rope_type": scaling.pop("kind"), "factor": scaling.pop("factor")}
    if raw["rope_type"] == "llama3":
        raw["original_max_position_embeddings"] = scaling.pop("original_max_position")
        raw |= scaling
    return raw


def _write_shards(
    model: Decoder, folder: Path, shard_bytes: int
) -> Iterator[tuple[Path, dict[str, int]]]:
    """Writes files of at most `shard_bytes` under temporary names; yields what each holds."""
    shard: dict[str, np.ndarray] = {}
    count = 0
    for name, value in itertools.chain(_tensors(model), [("", np.empty(0))]):
        full = sum(t.nbytes for t in shard.values()) + value.nbytes > shard_bytes
        if shard and (full or not name):
            partial = folder / f"model-{count}.partial"
            save_file(shard, partial, metadata={"format": "pt"})
            yield partial, {key: tensor.nbytes for key, tensor in shard.items()}
            shard, count = {}, count + 1
        shard[name] = value


def _tensors(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name, layer by layer within a parameter."""
    templates = FAMILIES[model.config.family].tensors
    for name, value in model.params.items():
        leading = templates[name].count("*") + templates[name].count("#")
        for index in itertools.product(*(range(size) for size in value.shape[:leading])):
            part = value
            for i in index:
                part = part[i]
            yield fill_template(templates[name], index), np.asarray(part)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
