"""Orbax trees on hubs: fetched once their id is known, then placed as from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kagglesdk import kaggle_env

from checkpoints import GOLDEN, mesh_of
from kaggle_hub import Kaggle
from moorage_models.automodel import load
from moorage_models.checkpoint import open_checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.sources import ModelRequest, ModelSource
from orbax_fixtures import write_flax

HANDLE = "org/gemma-2/flax/tiny"
STORED = "org/gemma-2/FLAX/tiny"  # as the API names the framework


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kaggle]:
    """A hub with a Flax checkpoint, as Kaggle's are, but for a config beside it."""
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    folder = write_flax(GOLDEN / "gemma2", tmp_path / "written").parent
    names = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    files = {name: path.read_bytes() for name, path in names.items()}
    files["config.json"] = (GOLDEN / "gemma2" / "config.json").read_bytes()
    with Kaggle() as hub:
        monkeypatch.setenv("MOORAGE_KAGGLE_ENDPOINT", hub.url)
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, hub.url)
        hub.push(STORED, files)
        hub.push(STORED.replace("tiny", "bare"), files | {"config.json": b"{}"})
        yield hub


def test_a_flax_tree_from_kaggle_has_the_bits_of_the_folder(hub: Kaggle, tmp_path: Path) -> None:
    request = ModelRequest("tiny", ModelSource.KAGGLE, HANDLE)
    checkpoint = open_checkpoint(request)
    assert (checkpoint.request, checkpoint.repository.revision) == (request, "1")
    params, _ = load(checkpoint, mesh_of(2, 2))
    own = write_flax(GOLDEN / "gemma2", tmp_path / "own")
    (own / "config.json").write_bytes((GOLDEN / "gemma2" / "config.json").read_bytes())
    local = open_checkpoint(ModelRequest("tiny", ModelSource.INTERNAL, str(own)))
    wanted, _ = load(local, mesh_of(2, 2))
    assert params.keys() == wanted.keys()
    for name, value in params.items():
        assert np.array_equal(np.asarray(value), np.asarray(wanted[name])), name


def test_a_look_fetches_no_tree(hub: Kaggle, tmp_path: Path) -> None:
    request = ModelRequest("tiny", ModelSource.KAGGLE, HANDLE)
    look = open_checkpoint(request, fetch_tree=False)
    assert look.config.num_layers > 0
    assert not list((tmp_path / "cache").rglob("_METADATA"))


def test_what_has_no_configuration_is_refused_before_the_fetch(hub: Kaggle, tmp_path: Path) -> None:
    path = HANDLE.replace("tiny", "bare")
    with pytest.raises(ModelError) as caught:
        open_checkpoint(ModelRequest("tiny", ModelSource.KAGGLE, path))
    assert caught.value.reason is not Reason.SOURCE_UNAVAILABLE
    assert not list((tmp_path / "cache").rglob("_METADATA"))
