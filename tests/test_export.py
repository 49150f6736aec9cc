"""Writing back: a saved folder holds the bits that were read, and a config that says the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints import GOLDEN, VARIANTS, mesh_of, open_folder, stored_tensors
from moorage_models.automodel import load
from moorage_models.decoder import Decoder
from moorage_models.export import save_pretrained
from moorage_models.families import PRESETS
from moorage_models.hf_config import read_config


def saved(name: str, folder: Path, shard_bytes: int = 1 << 30) -> Path:
    checkpoint, mesh = open_folder(GOLDEN / name), mesh_of(2, 2)
    params, _ = load(checkpoint, mesh)
    save_pretrained(Decoder(checkpoint.config, mesh, params, "float32"), folder, shard_bytes)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_has_the_bits_that_were_read(name: str, tmp_path: Path) -> None:
    written = stored_tensors(saved(name, tmp_path))
    original = stored_tensors(GOLDEN / name)
    text = {
        k.replace("model.language_model.", "model.").replace("language_model.", ""): v
        for k, v in original.items()
        if "vision" not in k and "projector" not in k
    }
    if name == "qwen3_tied":
        del text["lm_head.weight"]  # tied, and stored as well
    assert written.keys() == text.keys()
    for key, tensor in written.items():
        assert tensor.dtype == text[key].dtype, key
        assert np.array_equal(tensor.view(np.uint8), text[key].view(np.uint8)), key


@pytest.mark.parametrize("name", VARIANTS)
def test_the_config_reads_back_the_same(name: str, tmp_path: Path) -> None:
    config = open_folder(saved(name, tmp_path)).config
    assert config.differences(open_folder(GOLDEN / name).config) == []


def test_large_models_are_sharded_under_an_index(tmp_path: Path) -> None:
    saved("llama3", tmp_path, shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 2
    assert set(index["weight_map"].values()) == files
    tensors = stored_tensors(tmp_path)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_its_own_config_json(name: str) -> None:
    from moorage_models.export import write_config

    config = PRESETS[name]
    raw = json.loads(json.dumps(write_config(config, "bfloat16")))
    assert read_config(raw).differences(config) == []
