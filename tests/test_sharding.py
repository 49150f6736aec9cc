"""How parameters are laid over meshes, as tables; nothing is ever refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import GOLDEN, open_folder
from moorage_models.config import ModelConfig
from moorage_models.parameters import PARAMETERS, axis_sizes
from moorage_models.sharding import compute_spec, shard_shape, storage_spec

MESHES = ((1, 1), (2, 2), (1, 8), (8, 1), (4, 2))
#: One axis of a parameter: the mesh axes that split it, outermost first.
NONE, F, T, TF = (), ("fsdp",), ("tp",), ("tp", "fsdp")

# axes and shape -> the spec on each of MESHES
STORED: dict[tuple[str, tuple[int, ...]], list[tuple[tuple[str, ...], ...]]] = {
    ("v d", (320, 64)): [(NONE, NONE), (TF, NONE), (T, NONE), (F, NONE), (TF, NONE)],
    ("n d", (128, 64)): [(NONE, NONE), (TF, NONE), (T, NONE), (F, NONE), (TF, NONE)],
    ("f d", (96, 64)): [(NONE, NONE), (TF, NONE), (T, NONE), (F, NONE), (TF, NONE)],
    ("d n", (64, 128)): [(NONE, NONE), (F, T), (NONE, T), (F, NONE), (F, T)],
    ("d f", (64, 96)): [(NONE, NONE), (F, T), (NONE, T), (F, NONE), (F, T)],
    # key and value heads are stored in parts of heads: two heads of 16, one head of 16
    ("k d", (32, 64)): [(NONE, NONE), (TF, NONE), (T, NONE), (F, NONE), (TF, NONE)],
    ("k d", (16, 64)): [(NONE, NONE), (TF, NONE), (T, NONE), (F, NONE), (TF, NONE)],
    # vocabularies that divide by nothing, and by two alone
    ("v d", (323, 64)): [(NONE, NONE)] * 5,
    ("v d", (322, 64)): [(NONE, NONE), (T, NONE), (NONE, NONE), (NONE, NONE), (T, NONE)],
    # an odd feed-forward width, and heads whose product does not divide by eight
    ("f d", (93, 64)): [(NONE, NONE)] * 5,
    ("d f", (64, 93)): [(NONE, NONE), (F, NONE), (NONE, NONE), (F, NONE), (F, NONE)],
    ("n d", (14 * 2, 64)): [(NONE, NONE), (TF, NONE), (NONE, NONE), (NONE, NONE), (T, NONE)],
    ("d n", (63, 14)): [(NONE, NONE), (NONE, T), (NONE, NONE), (NONE, NONE), (NONE, T)],
    # whole experts if they divide, else their width over tp
    ("e m d", (8, 24, 48)): [
        (NONE, NONE, NONE),
        (TF, NONE, NONE),
        (T, NONE, NONE),
        (F, NONE, NONE),
        (TF, NONE, NONE),
    ],
    ("e m d", (6, 24, 48)): [
        (NONE, NONE, NONE),
        (T, NONE, NONE),
        (NONE, T, NONE),
        (NONE, NONE, NONE),
        (T, NONE, NONE),
    ],
    ("e d m", (5, 48, 24)): [
        (NONE, NONE, NONE),
        (NONE, NONE, T),
        (NONE, NONE, T),
        (NONE, NONE, NONE),
        (NONE, NONE, T),
    ],
    ("e d", (8, 48)): [(NONE, NONE), (TF, NONE), (T, NONE), (F, NONE), (TF, NONE)],
    # a reward model's head, and what is never split
    ("c d", (1, 64)): [(NONE, NONE)] * 5,
    ("c d", (2, 64)): [(NONE, NONE), (F, NONE), (NONE, NONE), (NONE, NONE), (NONE, NONE)],
    ("d", (64,)): [(NONE,)] * 5,
    ("n", (128,)): [(NONE,)] * 5,
    ("h", (16,)): [(NONE,)] * 5,
}


@pytest.mark.parametrize(
    ("axes", "shape", "mesh", "wanted"),
    [
        (axes, shape, mesh, spec)
        for (axes, shape), specs in STORED.items()
        for mesh, spec in zip(MESHES, specs, strict=True)
    ],
)
def test_how_parameters_are_stored(
    axes: str, shape: tuple[int, ...], mesh: tuple[int, int], wanted: tuple[tuple[str, ...], ...]
) -> None:
    assert storage_spec(axes, shape, {"fsdp": mesh[0], "tp": mesh[1]}) == wanted


@pytest.mark.parametrize(
    ("mesh", "wanted"), [({}, (NONE, NONE)), ({"fsdp": 4}, (F, NONE)), ({"tp": 4}, (T, NONE))]
)
def test_a_mesh_may_lack_an_axis(mesh: dict[str, int], wanted: tuple[tuple[str, ...], ...]) -> None:
    assert storage_spec("v d", (320, 64), mesh) == wanted


BASE = ModelConfig(
    family="qwen3",
    num_layers=2,
    vocab_size=320,
    embed_dim=64,
    hidden_dim=96,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    num_experts=8,
    expert_hidden_dim=24,
    num_labels=8,
)
ODD = replace(BASE, vocab_size=323, hidden_dim=93, expert_hidden_dim=21)

# config, tp -> the letters that are split over tp in arithmetic
COMPUTED = [
    (BASE, 1, ""),
    (BASE, 2, "nkfve"),
    (BASE, 8, "nfve"),  # two key and value heads are repeated, not split
    (replace(BASE, num_kv_heads=1), 2, "nfve"),
    (replace(BASE, num_kv_heads=1), 8, "nfve"),
    (replace(BASE, num_kv_heads=8), 8, "nkfve"),
    (replace(BASE, num_heads=14), 2, "nkfve"),
    (replace(BASE, num_heads=14), 4, "fve"),
    (replace(BASE, num_heads=14), 8, "fve"),
    (replace(BASE, num_heads=6, num_kv_heads=3), 2, "nfve"),
    (replace(BASE, num_experts=6), 4, "nfvm"),  # experts are split whole, or else their width
    (ODD, 2, "nke"),
    (ODD, 8, "ne"),
    (replace(ODD, num_experts=7), 2, "nk"),
]


@pytest.mark.parametrize("fsdp", [1, 2, 8])
@pytest.mark.parametrize(("config", "tp", "split"), COMPUTED)
def test_how_parameters_are_multiplied(config: ModelConfig, tp: int, split: str, fsdp: int) -> None:
    """Whole heads, columns and rows over tp; over fsdp everything is gathered."""
    letters = list("vdnkhfemc")
    found = compute_spec(letters, config, {"fsdp": fsdp, "tp": tp})
    assert found == tuple(T if letter in split else NONE for letter in letters)


@pytest.mark.parametrize("name", ["gemma3_mm_4b", "qwen3_moe"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_layers_are_never_split(name: str, mesh: tuple[int, int]) -> None:
    """Not even eight layers over eight devices: a scan over them would gather them all."""
    for parameter in open_folder(GOLDEN / name).plan.parameters:
        spec = parameter.spec({"fsdp": mesh[0], "tp": mesh[1]})
        assert len(spec) == len(parameter.shape)
        if parameter.name.startswith("layers."):
            assert spec[0] == ()


SIZES = st.integers(1, 70)


@given(
    axes=st.sampled_from(sorted({parameter.axes for parameter in PARAMETERS.values()})),
    sizes=st.lists(SIZES, min_size=3, max_size=3),
    mesh=st.fixed_dictionaries({}, optional={"fsdp": st.integers(1, 9), "tp": st.integers(1, 9)}),
)
def test_any_sizes_have_a_layout(axes: str, sizes: list[int], mesh: dict[str, int]) -> None:
    shape = tuple(sizes[: len(axes.split())])
    spec = storage_spec(axes, shape, mesh)
    used = [axis for split in spec for axis in split]
    assert len(used) == len(set(used)) <= 2
    part = shard_shape(shape, spec, mesh)
    for size, mine, split in zip(shape, part, spec, strict=True):
        assert mine * math.prod(mesh[axis] for axis in split) == size


@given(
    heads=SIZES,
    groups=SIZES,
    sizes=st.lists(SIZES, min_size=4, max_size=4),
    tp=st.integers(1, 16),
)
def test_any_config_has_an_arithmetic(heads: int, groups: int, sizes: list[int], tp: int) -> None:
    vocab, hidden, experts, width = sizes
    config = replace(
        BASE,
        num_heads=heads * groups,
        num_kv_heads=heads,
        vocab_size=vocab,
        hidden_dim=hidden,
        num_experts=experts,
        expert_hidden_dim=width,
    )
    for letter, size in axis_sizes(config).items():
        (split,) = compute_spec([letter], config, {"fsdp": 2, "tp": tp})
        assert split in (NONE, T)
        assert not split or size % tp == 0
