"""The usage that Tunix's page on models publishes, as it stands there but for the imports.

What its ids and paths name lies on loopback, tiny: a golden Gemma 2 in float32, and the presets of
the ids are its configuration, for where no config.json lies beside the weights, as on Kaggle.
"""

# ruff: noqa: F401, F811 (fixtures are imported)
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import snapshot_download
from jax.sharding import Mesh

import moorage_models as model_lib
import moorage_models as params_lib
from checkpoints import GOLDEN, open_folder
from moorage_models import AutoModel, Decoder, ModelSource
from moorage_models.families import PRESETS
from places import Places, caches, files_of, places

KAGGLE = "google/gemma-2/flax/gemma2-2b-it"

#: jax says so of `with mesh:`, which goes on to work.
DEPRECATED = pytest.mark.filterwarnings("ignore:.*has been deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def published(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the published ids mean the golden checkpoint."""
    config = open_folder(GOLDEN / "gemma2").config
    for preset in ("gemma2_2b", "gemma2_2b_it"):
        monkeypatch.setitem(PRESETS, preset, config)
    folder = files_of("gemma2", "safetensors", "float32")
    strays = {"README.md": b"# A model", "pytorch_model.pth": b"pickle"}
    places.put(ModelSource.HUGGINGFACE, "google/gemma-2-2b-it", {**folder, **strays})
    places.put(ModelSource.KAGGLE, KAGGLE, bare(files_of("gemma2", "flax", "float32")))


def bare(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """As stored by those whose loader needs no config.json."""
    return {name: content for name, content in files.items() if name != "config.json"}


@pytest.fixture
def mesh() -> Mesh:
    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def check(model: Decoder) -> None:
    """The log-probabilities are those that transformers computes in float32."""
    with np.load(GOLDEN / "gemma2" / "golden.npz") as golden:
        tokens, wanted = golden["plain/tokens"], golden["plain/logprobs"]
        tolerance = 3 * golden["plain/noise"] + 2e-5
    logits, _ = model(tokens)
    logprobs = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
    found = np.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    assert np.isfinite(wanted[:, 1:]).all()
    np.testing.assert_allclose(found, wanted[:, 1:], rtol=0, atol=tolerance)


def test_basic_usage(mesh: Mesh, capsys: pytest.CaptureFixture[str]) -> None:
    model, model_path = AutoModel.from_pretrained(
        model_id="google/gemma-2-2b-it",  # Using HF id as model_id
        mesh=mesh,
    )

    print(f"Model loaded from: {model_path}")

    assert capsys.readouterr().out.startswith("Model loaded from: /")
    check(model)


def test_from_kaggle(mesh: Mesh) -> None:
    model, model_path = AutoModel.from_pretrained(
        model_id="gemma2_2b_it",  # Using model_config_id as model_id
        mesh=mesh,
        model_source=ModelSource.KAGGLE,
        model_path="google/gemma-2/flax/gemma2-2b-it",
    )
    assert Path(model_path, "_METADATA").exists()
    check(model)


@pytest.mark.parametrize("layout", ["safetensors", "flax"])
@pytest.mark.parametrize("model_id", ["gemma2_2b_it", "google/gemma-2-2b-it"])
def test_from_gcs(mesh: Mesh, places: Places, layout: str, model_id: str) -> None:
    """The page has the first id, and says that the second does as well."""
    path = f"gs://{layout}-bucket/gemma-2-2b-it"
    places.put(ModelSource.GCS, path, bare(files_of("gemma2", layout, "float32")))
    model, model_path = AutoModel.from_pretrained(
        model_id=model_id,
        mesh=mesh,
        model_source=ModelSource.GCS,
        model_path=path,
    )
    assert Path(model_path).is_dir()
    check(model)


@DEPRECATED
def test_safe_tensors_from_a_snapshot() -> None:
    ignore_patterns = [
        "*.pth",  # Ignore PyTorch .pth weight files
    ]
    MODEL_PATH = snapshot_download(  # noqa: N806 as published
        repo_id="google/gemma-2-2b-it", ignore_patterns=ignore_patterns
    )
    create_from(MODEL_PATH)


@DEPRECATED
def test_safe_tensors_from_a_bucket(places: Places) -> None:
    MODEL_PATH = "gs://your-bucket-dev/your-model-checkpoints"  # noqa: N806 as published
    files = files_of("gemma2", "safetensors", "float32")
    places.put(ModelSource.GCS, MODEL_PATH, bare(files))
    create_from(MODEL_PATH)


def create_from(MODEL_PATH: str) -> None:  # noqa: N803 as published
    config = model_lib.ModelConfig.gemma2_2b()
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        gemma = params_lib.create_model_from_safe_tensors(MODEL_PATH, config, mesh)
    check(gemma)
