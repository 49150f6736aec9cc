"""The naming rules: examples, traps, every published id, and any text at all."""

from __future__ import annotations

import json
import pathlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moorage_models.config import ModelConfig
from moorage_models.errors import ModelError, Reason
from moorage_models.families import FAMILIES, PRESETS
from moorage_models.naming import ALIASES, ModelNaming, nearest, preset_for

PUBLISHED = json.loads(
    (pathlib.Path(__file__).parent / "data" / "published_models.json").read_text()
)

# id -> name, family, version, category, config id
PARSED = {
    "google/gemma-2-2b-it": "gemma-2-2b-it gemma2 2b_it gemma gemma2_2b_it",
    "google/gemma-1.1-7b-it": "gemma-1.1-7b-it gemma1p1 7b_it gemma gemma1p1_7b_it",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b llama3p1 8b llama3 llama3p1_8b",
    "meta-llama/Meta-Llama-3.1-8B": "llama-3.1-8b llama3p1 8b llama3 llama3p1_8b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b llama3 8b llama3 llama3_8b",
    "Qwen/Qwen2.5-0.5B": "qwen2.5-0.5b qwen2p5 0p5b qwen2 qwen2p5_0p5b",
    "google/gemma-2/flax/gemma2-2b-it": "gemma2-2b-it gemma2 2b_it gemma gemma2_2b_it",
    "gemma2_2b_it": "gemma2_2b_it gemma2 2b_it gemma gemma2_2b_it",
    "llama3p2_1b": "llama3p2_1b llama3p2 1b llama3 llama3p2_1b",
    "Gemma2_2B_IT": "gemma2_2b_it gemma2 2b_it gemma gemma2_2b_it",
    "my-org/gemma2_2b_it": "gemma2_2b_it gemma2 2b_it gemma gemma2_2b_it",
    "Llama-3.1-8B": "llama-3.1-8b llama3p1 8b llama3 llama3p1_8b",
    # every beginning that is not in the rows above
    "google/gemma-7b": "gemma-7b gemma 7b gemma gemma_7b",
    "my_org/gemma_2b": "gemma_2b gemma 2b gemma gemma_2b",
    "gemma1.1-2b-it": "gemma1.1-2b-it gemma1p1 2b_it gemma gemma1p1_2b_it",
    "gemma1p1_2b_it": "gemma1p1_2b_it gemma1p1 2b_it gemma gemma1p1_2b_it",
    "google/gemma-3-1b-pt": "gemma-3-1b-pt gemma3 1b_pt gemma3 gemma3_1b_pt",
    "gemma3-1b-it": "gemma3-1b-it gemma3 1b_it gemma3 gemma3_1b_it",
    "gemma3_270m": "gemma3_270m gemma3 270m gemma3 gemma3_270m",
    "llama3-70b": "llama3-70b llama3 70b llama3 llama3_70b",
    "llama3_70b": "llama3_70b llama3 70b llama3 llama3_70b",
    "llama3.1-70b": "llama3.1-70b llama3p1 70b llama3 llama3p1_70b",
    "llama3p1_70b": "llama3p1_70b llama3p1 70b llama3 llama3p1_70b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b llama3p2 3b llama3 llama3p2_3b",
    "llama3.2-3b": "llama3.2-3b llama3p2 3b llama3 llama3p2_3b",
    "qwen2p5_0p5b": "qwen2p5_0p5b qwen2p5 0p5b qwen2 qwen2p5_0p5b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b qwen3 30b_a3b qwen3 qwen3_30b_a3b",
    "qwen3_0p6b": "qwen3_0p6b qwen3 0p6b qwen3 qwen3_0p6b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        "deepseek-r1-distill-qwen-1.5b deepseek_r1_distill_qwen 1p5b qwen2 "
        "deepseek_r1_distill_qwen_1p5b"
    ),
    "deepseek_r1_distill_qwen_7b": (
        "deepseek_r1_distill_qwen_7b deepseek_r1_distill_qwen 7b qwen2 deepseek_r1_distill_qwen_7b"
    ),
    # names that parse and are not models
    "gemma-9b": "gemma-9b gemma 9b gemma gemma_9b",
    "gemma_9b": "gemma_9b gemma 9b gemma gemma_9b",
    "llama3_405b": "llama3_405b llama3 405b llama3 llama3_405b",
    "google/gemma-2": "gemma-2 gemma 2 gemma gemma_2",
    "google/gemma-3n-E2B-it": "gemma-3n-e2b-it gemma 3n_e2b_it gemma gemma_3n_e2b_it",
    "gemma--2b": "gemma--2b gemma 2b gemma gemma_2b",
    # the longest id
    "gemma-" + "2" * 250: " ".join(
        ["gemma-" + "2" * 250, "gemma", "2" * 250, "gemma", "gemma_" + "2" * 250]
    ),
}

REFUSED = {
    # mixed styles
    "gemma2_2b-it": Reason.MODEL_FAMILY_UNKNOWN,
    "qwen2.5_0.5b": Reason.MODEL_FAMILY_UNKNOWN,
    # families that no rule knows
    "my-org/run-7": Reason.MODEL_FAMILY_UNKNOWN,
    "meta-llama/Llama-3.3-70B-Instruct": Reason.MODEL_FAMILY_UNKNOWN,
    "mistral_7b": Reason.MODEL_FAMILY_UNKNOWN,
    # no style
    "gemma": Reason.MODEL_ID_UNPARSEABLE,
    "google/gemma": Reason.MODEL_ID_UNPARSEABLE,
    "my-org/gemma": Reason.MODEL_ID_UNPARSEABLE,
    # no name, no version
    "google/": Reason.MODEL_ID_UNPARSEABLE,
    "gemma-": Reason.MODEL_ID_UNPARSEABLE,
    "gemma2_": Reason.MODEL_ID_UNPARSEABLE,
    "gemma-@b": Reason.MODEL_ID_UNPARSEABLE,
    "gemma-_2b": Reason.MODEL_ID_UNPARSEABLE,
    # not an id at all
    "": Reason.MODEL_ID_UNPARSEABLE,
    "google/gemma-2b\n": Reason.MODEL_ID_UNPARSEABLE,
    "gemma-2b\ud800": Reason.MODEL_ID_UNPARSEABLE,
    "gemma-" + "2" * 251: Reason.MODEL_ID_UNPARSEABLE,
}


def names(naming: ModelNaming) -> list[str]:
    return [
        naming.model_name,
        naming.model_family,
        naming.model_version,
        naming.model_config_category,
        naming.model_config_id,
    ]


@pytest.mark.parametrize(("model_id", "expected"), PARSED.items())
def test_id_gives_every_name(model_id: str, expected: str) -> None:
    naming = ModelNaming(model_id=model_id)
    assert naming.model_id == model_id
    assert names(naming) == expected.split()


@pytest.mark.parametrize("expected", PARSED.values())
def test_name_gives_the_same_names(expected: str) -> None:
    naming = ModelNaming(model_name=expected.split()[0])
    assert naming.model_id is None
    assert names(naming) == expected.split()


@pytest.mark.parametrize(("model_id", "reason"), REFUSED.items(), ids=range(len(REFUSED)))
def test_id_is_refused(model_id: str, reason: Reason) -> None:
    with pytest.raises(ModelError) as caught:
        ModelNaming(model_id=model_id)
    assert caught.value.reason == reason
    caught.value.message.encode()  # fit for the wire


def test_nothing_given_is_refused() -> None:
    with pytest.raises(ModelError, match="give model_id or model_name"):
        ModelNaming()


@pytest.mark.parametrize("config_id", PUBLISHED)
def test_published_id_names_its_preset(config_id: str) -> None:
    assert (
        ModelNaming(model_id=PUBLISHED[config_id]["repository"]).model_config_id
        == ModelNaming(model_id=config_id).model_config_id
        == config_id
    )


@pytest.mark.parametrize(
    ("attribute", "value", "derived"),
    [
        ("model_name", "gemma-7b", "gemma-2b"),
        ("model_family", "llama3", "gemma"),
        ("model_version", "7b", "2b"),
        ("model_config_category", "llama3", "gemma"),
        ("model_config_id", "gemma_7b", "gemma_2b"),
    ],
)
def test_mismatch_names_both(attribute: str, value: str, derived: str) -> None:
    ModelNaming(model_id="google/gemma-2b", **{attribute: derived})
    with pytest.raises(ModelError, match=f"'{value}'.*'{derived}'") as caught:
        ModelNaming(model_id="google/gemma-2b", **{attribute: value})
    assert caught.value.reason == Reason.INVALID_REQUEST


@pytest.mark.parametrize(
    ("config_id", "first"),
    [
        ("gemma_9b", "gemma2_9b"),
        ("llama3_405b", "llama3p1_405b"),
        ("gemma2_2b-it", "gemma2_2b_it"),
        ("qwen2.5_0.5b", "qwen2p5_0p5b"),
        ("google/gemma-2-2b-itt", "gemma2_2b_it"),
    ],
)
def test_nearest(config_id: str, first: str) -> None:
    assert nearest(config_id)[0] == first
    assert len(nearest(config_id, n=2)) == 2


def test_errors_carry_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"'gemma_9b'.*gemma2_9b, ") as caught:
        preset_for("gemma_9b")
    assert caught.value.reason == Reason.CONFIG_UNKNOWN
    assert caught.value.details["nearest"].split(",")[0] == "gemma2_9b"

    with pytest.raises(ModelError, match="qwen2p5_0p5b, ") as caught:
        ModelNaming(model_id="qwen2.5_0.5b")
    assert caught.value.details["nearest"].split(",")[0] == "qwen2p5_0p5b"


@pytest.mark.parametrize(
    ("alias", "config_id"),
    [
        ("qwen3_30b", "qwen3_30b_a3b"),
        ("gemma3_1b", "gemma3_1b_pt"),
        ("gemma3_4b", "gemma3_4b_pt"),
        ("gemma3_12b", "gemma3_12b_pt"),
        ("gemma3_27b", "gemma3_27b_pt"),
    ],
)
def test_alias_means_its_preset(alias: str, config_id: str) -> None:
    assert preset_for(alias) is preset_for(config_id)


def test_aliases_hide_no_preset() -> None:
    assert not ALIASES.keys() & PRESETS.keys()
    assert set(ALIASES.values()) <= PRESETS.keys()


@pytest.mark.parametrize("config_id", PRESETS)
def test_preset_by_id_and_by_attribute(config_id: str) -> None:
    assert preset_for(config_id) is getattr(ModelConfig, config_id)() is PRESETS[config_id]


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="gemma_9b"):
        _ = ModelConfig.gemma_9b


BEGINNINGS = [
    beginning
    for family in FAMILIES.values()
    for prefix in family.prefixes
    for beginning in (*prefix.hf, f"{prefix.family}_")
]


@given(st.text(max_size=300) | st.builds(str.__add__, st.sampled_from(BEGINNINGS), st.text()))
@example("/")
@example("meta-llama-")
def test_any_text_names_a_model_or_is_refused(text: str) -> None:
    naming = parse(text)
    if isinstance(naming, ModelError):
        assert naming.reason in (Reason.MODEL_ID_UNPARSEABLE, Reason.MODEL_FAMILY_UNKNOWN)
        naming.message.encode()
        return
    assert naming.model_config_id == f"{naming.model_family}_{naming.model_version}"
    assert naming.model_version[0].isalnum()
    assert not set("-.") & set(naming.model_config_id)
    assert names(ModelNaming(model_name=naming.model_name)) == names(naming)
    assert ModelNaming(model_id=naming.model_config_id).model_family == naming.model_family


def parse(text: str) -> ModelNaming | ModelError:
    try:
        return ModelNaming(model_id=text)
    except ModelError as error:
        return error
