"""ResolveName and LoadModel say the same of what was checked, for every preset and source."""

# ruff: noqa: F401, F811 (fixtures are imported)
import pytest

import moorage
from golden_server import bad, client, server
from moorage_models.families import PRESETS
from test_refusals import PATHS

SOURCES = [
    ("internal", "no_config", "CHECKPOINT_MISMATCH"),  # tiny tensors, and no config.json
    ("internal", "absent", "CHECKPOINT_NOT_FOUND"),
    ("internal", "/etc", "SOURCE_NOT_ALLOWED"),
    ("internal", "", "MODEL_PATH_REQUIRED"),
    ("maxtext", "no_config", "CHECKPOINT_MISMATCH"),
    ("huggingface", "", "MODEL_PATH_REQUIRED"),  # a config id names no repository
    ("kaggle", "a/b/flax/c", "SOURCE_NOT_ALLOWED"),
    ("gcs", "gs://a/b", "SOURCE_NOT_ALLOWED"),
]


def refusals(client: moorage.Client, model_id: str, source: str, path: str) -> tuple[str, str]:
    """Why it cannot be loaded, by ResolveName and by LoadModel."""
    found = client.resolve(model_id, source, path)
    assert not found.loadable
    assert found.message
    with pytest.raises(moorage.Error) as caught:
        client.load(model_id, source=source, model_path=path)
    return found.reason, caught.value.reason


@pytest.mark.parametrize(("source", "path", "reason"), SOURCES)
def test_every_preset_is_refused_alike(
    client: moorage.Client, source: str, path: str, reason: str
) -> None:
    for name in PRESETS:
        assert refusals(client, name, source, path) == (reason, reason), name


@pytest.mark.parametrize(("model_id", "path"), [row[:2] for row in PATHS])
def test_every_bad_checkpoint_is_refused_alike(
    client: moorage.Client, model_id: str, path: str
) -> None:
    by_name, by_load = refusals(client, model_id, "internal", path)
    assert by_name == by_load


@pytest.mark.parametrize("name", ["llama3", "gemma3_text_mqa"])
def test_what_is_said_to_load_loads(client: moorage.Client, name: str) -> None:
    found = client.resolve(name, "internal", name, estimate=True)
    assert found.loadable
    assert found.checked == ("name", "source", "config", "headers")
    model = client.load(name, source="internal", model_path=name)
    assert model.revision == found.revision
    assert model.device_bytes == found.device_bytes


def test_without_a_source_only_the_name_is_read(client: moorage.Client) -> None:
    for name, config in PRESETS.items():
        found = client.resolve(name)
        assert found.loadable
        assert found.checked == ("name", "preset")
        assert found.config.num_parameters == config.num_parameters
