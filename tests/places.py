"""Every place that checkpoints are loaded from, at once: hubs, buckets and a folder on loopback."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from checkpoints import GOLDEN, stored_tensors
from downloads import contents
from gcs import Gcs, fake_gcs_server
from hub import Hub
from hubs import bucket, huggingface, kagglehub
from kaggle_hub import Kaggle
from moorage_models.sources import ModelSource
from orbax_fixtures import write_flax, write_maxtext


@dataclass(frozen=True)
class Places:
    """What serves while the fixture `places` lives.

    Attributes:
        hub: Hugging Face's.
        kaggle: Kaggle's.
        gcs: The buckets.
        folder: A folder for checkpoints in directories.
    """

    hub: Hub
    kaggle: Kaggle
    gcs: Gcs
    folder: Path

    def put(self, source: ModelSource, path: str, files: Mapping[str, bytes]) -> None:
        """Puts files where the `model_path` of a source leads."""
        if path.startswith("gs://"):
            bucket, prefix = path.removeprefix("gs://").split("/", 1)
            self.gcs.put(bucket, {f"{prefix}/{name}": content for name, content in files.items()})
        elif source is ModelSource.HUGGINGFACE:
            self.hub.push(path, files)
        elif source is ModelSource.KAGGLE:
            owner, model, framework, variation = path.split("/")
            self.kaggle.push(f"{owner}/{model}/{framework.upper()}/{variation}", files)
        else:
            for name, content in files.items():
                target = Path(path, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """All places, which the clients go to, without a credential."""
    folder = tmp_path_factory.mktemp("places")
    with (
        pytest.MonkeyPatch.context() as patch,
        fake_gcs_server() as url,
        huggingface(patch, folder) as hub,
        kagglehub(patch, folder) as kaggle,
        bucket(patch, folder, url) as gcs,
    ):
        yield Places(hub, kaggle, gcs, folder)


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache for every hub: what is loaded has come from there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    monkeypatch.setenv("MOORAGE_CACHE", str(tmp_path / "moorage"))


def _safetensors(name: str, out: Path, dtype: Any) -> None:
    if dtype is not None:
        tensors = {key: value.astype(dtype) for key, value in stored_tensors(GOLDEN / name).items()}
        (out / "model.safetensors").write_bytes(save(tensors))
        return
    for file, content in contents(GOLDEN / name).items():
        if file != "golden.npz":
            (out / file).write_bytes(content)


_WRITERS: Mapping[str, Callable[[str, Path, Any], object]] = {
    "safetensors": _safetensors,
    "flax": lambda name, out, dtype: write_flax(GOLDEN / name, out, dtype=dtype),
    "maxtext": lambda name, out, dtype: write_maxtext(
        GOLDEN / name, out, scanned=True, dtype=dtype
    ),
}


@functools.cache
def files_of(name: str, layout: str, dtype: Any = None) -> Mapping[str, bytes]:
    """The files of a golden checkpoint in a layout, with its config.json.

    Args:
        name: The golden checkpoint.
        layout: "safetensors", "flax" or "maxtext".
        dtype: The stored dtype; None is the golden's, and float32 for "maxtext".
    """
    config = (GOLDEN / name / "config.json").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        _WRITERS[layout](name, Path(folder), np.dtype(dtype) if dtype else None)
        return {**contents(Path(folder)), "config.json": config}
