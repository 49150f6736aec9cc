"""Presets against what was published.

`data/published_models.json` has, for every preset, the repository, the numbers of its
`config.json` that no parameter count can show, and the parameter count of transformers' own
model: that of the text decoder, with a tied head counted once. It equals the sizes that the
hub shows where a repository holds nothing else.
"""

from __future__ import annotations

import json
import pathlib
from collections import Counter

import pytest

from moorage_models.families import FAMILIES, PRESETS
from moorage_models.parameters import parameter_shapes

PUBLISHED = json.loads(
    (pathlib.Path(__file__).parent / "data" / "published_models.json").read_text()
)


def test_every_preset_has_its_published_numbers() -> None:
    assert PRESETS.keys() == PUBLISHED.keys()
    assert len(PRESETS) == 72


@pytest.mark.parametrize("config_id", PRESETS)
def test_preset_is_as_published(config_id: str) -> None:
    config, published = PRESETS[config_id], PUBLISHED[config_id]
    assert config.num_parameters == published["parameters"]
    assert config.max_position == published["max_position"]
    assert config.norm_eps == published["norm_eps"]
    assert config.rope_theta == published["rope_theta"]


@pytest.mark.parametrize(
    ("config_id", "count"),
    [
        ("llama3p1_8b", 8_030_261_248),
        ("llama3p1_405b", 405_853_388_800),
        ("llama3p2_1b", 1_235_814_400),
        ("qwen3_0p6b", 596_049_920),
        ("qwen3_30b_a3b", 30_532_122_624),
        ("qwen2p5_0p5b", 494_032_768),
        ("gemma_7b", 8_537_680_896),
        ("gemma2_2b", 2_614_341_888),
        ("gemma3_270m", 268_098_176),
    ],
)
def test_well_known_counts(config_id: str, count: int) -> None:
    assert PRESETS[config_id].num_parameters == count


@pytest.mark.parametrize(
    ("config_id", "scalar"),
    [
        ("gemma_2b", 256),
        ("gemma2_2b", 256),
        ("gemma2_9b", 256),
        ("gemma2_27b", 144),
        ("gemma3_270m", 256),
        ("gemma3_12b_pt", 256),
        ("gemma3_27b_pt", 168),
        ("llama3p2_1b", 64),
        ("qwen2p5_0p5b", 64),
        ("qwen3_0p6b", 128),
    ],
)
def test_query_scale(config_id: str, scalar: int) -> None:
    assert PRESETS[config_id].query_scale == pytest.approx(scalar**-0.5, rel=1e-15)


@pytest.mark.parametrize(
    ("config_id", "kinds", "window"),
    [
        ("gemma_2b", "G" * 18, None),
        ("gemma2_2b", "LG" * 13, 4096),
        ("gemma3_1b_pt", "LLLLLG" * 4 + "LL", 512),
        ("gemma3_4b_pt", "LLLLLG" * 5 + "LLLL", 1024),
    ],
)
def test_layer_kinds(config_id: str, kinds: str, window: int | None) -> None:
    assert PRESETS[config_id].layer_kinds == kinds
    assert PRESETS[config_id].window == window


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("gemma", {"input", "post_attention"}),
        ("gemma2", {"input", "post_attention", "pre_feedforward", "post_feedforward"}),
        ("gemma3", {"input", "post_attention", "pre_feedforward", "post_feedforward"}),
        ("llama3", {"input", "post_attention"}),
        ("qwen2", {"input", "post_attention"}),
        ("qwen3", {"input", "post_attention"}),
    ],
)
def test_norms_of_a_layer(family: str, norms: set[str]) -> None:
    names = {f"model.layers.*.{norm}_layernorm.weight" for norm in norms}
    tensors = FAMILIES[family].tensors.values()
    assert {name for name in tensors if "_layernorm" in name} == names


@pytest.mark.parametrize("config_id", PRESETS)
def test_every_parameter_has_one_tensor(config_id: str) -> None:
    config = PRESETS[config_id]
    tensors = FAMILIES[config.family].tensors
    assert parameter_shapes(config).keys() <= tensors.keys()
    assert max(Counter(tensors.values()).values()) == 1


def test_families_are_told_apart_by_architecture() -> None:
    architectures = [a for family in FAMILIES.values() for a in family.architectures]
    assert max(Counter(architectures).values()) == 1


@pytest.mark.parametrize("config_id", PRESETS)
def test_preset_belongs_to_its_family(config_id: str) -> None:
    config = PRESETS[config_id]
    family = FAMILIES[config.family]
    assert config_id in family.presets
    assert {k: getattr(config, k) for k in family.switches} == dict(family.switches)
    assert any(config_id.startswith(f"{prefix.family}_") for prefix in family.prefixes)
