"""The bound on temporaries against what the compiler says of the compiled programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from jax.sharding import Mesh
from jax.stages import Compiled

from checkpoints import GOLDEN, VARIANTS, mesh_of, open_folder
from moorage_models.families import PRESETS
from moorage_models.plan import Plan, preset_plan
from moorage_server.engine import Bucket
from moorage_server.engine.outputs import served
from moorage_server.engine.programs import (
    compile_lowered,
    lower_gather,
    lower_head,
    lower_trunk,
    split_params,
)
from moorage_server.engine.temporaries import temporary_bytes

Sizes = tuple[int, int]  # fsdp, tp

DTYPES = ["float32", "bfloat16"]
MESHES: list[Sizes] = [(1, 1), (2, 2), (1, 8), (8, 1), (4, 2)]

#: Experts; all variants are in the soak.
QUICK: list[tuple[str, Sizes, str]] = [
    ("qwen3_moe", (2, 2), "float32"),
]

#: Preset, stored and compute dtype, mesh, rows x length, and how far the bound may be above.
REAL = [
    ("gemma2_2b", "bfloat16", "bfloat16", (8, 1), (8, 2048), 1.5),  # a gathered head
]
REAL_SOAK = [
    ("qwen3_8b", "bfloat16", "bfloat16", (1, 8), (1, 8192), 2.6),  # activations
    ("qwen3_30b_a3b", "float32", "float32", (1, 8), (1, 128), 1.4),  # experts
    ("qwen2p5_7b", "float32", "float32", (1, 8), (1, 128), 1.3),  # stacks laid anew
    ("qwen3_30b_a3b", "bfloat16", "bfloat16", (1, 8), (1, 8192), 3.0),  # experts, one by one
    ("llama3p1_8b", "bfloat16", "bfloat16", (4, 2), (4, 128), 1.6),  # a gathered table
    ("gemma2_2b", "bfloat16", "bfloat16", (1, 1), (1, 2048), 3.0),
    ("gemma3_27b_it", "bfloat16", "bfloat16", (1, 8), (1, 2048), 3.0),
    ("gemma3_27b_it", "bfloat16", "bfloat16", (1, 8), (1, 8192), 3.0),
    ("gemma3_27b_it", "bfloat16", "bfloat16", (1, 8), (8, 512), 3.0),
    ("gemma3_27b_it", "bfloat16", "bfloat16", (8, 1), (8, 2048), 3.0),
    ("llama3p1_8b", "bfloat16", "bfloat16", (4, 2), (4, 2048), 3.0),
    ("llama3p1_8b", "float32", "float32", (2, 4), (2, 128), 3.0),
    ("llama3p1_70b", "float32", "float32", (2, 4), (2, 128), 3.0),
    ("qwen3_8b", "bfloat16", "bfloat16", (1, 8), (1, 32768), 3.0),
    ("qwen3_30b_a3b", "bfloat16", "bfloat16", (8, 1), (8, 2048), 3.0),
    ("qwen3_30b_a3b", "bfloat16", "float32", (1, 1), (1, 128), 3.0),
    ("qwen3_30b_a3b", "float32", "float32", (2, 4), (2, 128), 3.0),
]


@pytest.mark.parametrize(("name", "sizes", "dtype"), QUICK)
def test_bound_holds(name: str, sizes: Sizes, dtype: str) -> None:
    _check_golden(name, dtype, sizes, [(1, 384)])


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_bound_holds_for_every_variant(name: str, sizes: Sizes, dtype: str) -> None:
    _check_golden(name, dtype, sizes, [(1, 128), (8, 128), (8, 512), (1, 2048)])


@pytest.mark.parametrize(
    ("preset", "stored", "computed", "sizes", "shape", "limit"),
    [*REAL, *(pytest.param(*row, marks=pytest.mark.soak) for row in REAL_SOAK)],
)
def test_bound_is_near_at_published_sizes(
    preset: str, stored: str, computed: str, sizes: Sizes, shape: tuple[int, int], limit: float
) -> None:
    plan = preset_plan(PRESETS[preset], stored)
    heads, bucket = _heads(plan, mesh_of(*sizes)), Bucket(shape[1], shape[0])
    bound, compiled = _bound_and_compiled(plan, computed, sizes, bucket, heads)
    assert compiled <= bound <= limit * compiled


def test_bound_holds_where_the_head_is_small() -> None:
    plan = preset_plan(replace(PRESETS["llama3p1_8b"], num_labels=1))
    bucket = Bucket(128, 4)
    heads = _heads(plan, mesh_of(4, 2))
    bound, compiled = _bound_and_compiled(plan, "bfloat16", (4, 2), bucket, heads)
    assert compiled <= bound <= 1.7 * compiled  # a gathered embedding table


def test_bound_is_that_of_the_largest_bucket() -> None:
    plan = preset_plan(PRESETS["qwen3_8b"])
    mesh = {"fsdp": 1, "tp": 8}
    small, large = Bucket(128, 1), Bucket(8192, 1)
    both = temporary_bytes(plan, "bfloat16", mesh, [small, large])
    assert both == temporary_bytes(plan, "bfloat16", mesh, [large])
    assert both > temporary_bytes(plan, "bfloat16", mesh, [small])


@pytest.mark.parametrize(
    ("preset", "larger", "smaller"),
    [("qwen3_30b_a3b", "tpu", "cpu"), ("llama3p1_8b", "cpu", "tpu")],
)
def test_without_a_platform_the_larger_is_counted(preset: str, larger: str, smaller: str) -> None:
    stored = "bfloat16" if larger == "tpu" else "float32"
    plan = preset_plan(PRESETS[preset], stored)
    sizes = {"fsdp": 2, "tp": 4}
    of = {
        platform: temporary_bytes(plan, stored, sizes, [Bucket(8192, 2)], platform)
        for platform in ("", "cpu", "tpu")
    }
    assert of[""] == of[larger] > of[smaller]


def _check_golden(name: str, dtype: str, sizes: Sizes, shapes: list[tuple[int, int]]) -> None:
    plan = open_folder(GOLDEN / name, compute_dtype=dtype).plan
    heads = _heads(plan, mesh_of(*sizes))
    for rows, length in shapes:
        bucket = Bucket(length, max(rows, sizes[0]))
        bound, compiled = _bound_and_compiled(plan, dtype, sizes, bucket, heads)
        assert compiled <= bound, bucket


def _heads(plan: Plan[Any], mesh: Mesh) -> list[Compiled]:
    return [compile_lowered(lower_head(plan, mesh, p), mesh) for p in served(plan.config)]


def _bound_and_compiled(
    plan: Plan[Any], dtype: str, sizes: Sizes, bucket: Bucket, heads: list[Compiled]
) -> tuple[int, int]:
    """The bound, and what the compiled programs take beside the parameters.

    While a head runs on a chunk, the trunk's result is held, and of the chunk before the hidden
    states and the result.
    """
    mesh = mesh_of(*sizes)
    axes = dict(mesh.shape)
    trunk_params, head_params = split_params(
        {p.name: p.device_bytes(axes) for p in plan.parameters}, plan.config
    )
    trunk = compile_lowered(lower_trunk(plan, dtype, mesh, bucket), mesh, is_trunk=True)
    gather = compile_lowered(lower_gather(plan, mesh, bucket), mesh)
    result = max(map(_result_bytes, heads))
    states = _result_bytes(gather)
    held = _result_bytes(trunk) + states
    figures = [
        _bytes(trunk, trunk_params),
        _bytes(gather, {}) + states + 2 * result,
        *(held + _bytes(head, head_params) + _result_bytes(head) for head in heads),
    ]
    return temporary_bytes(plan, dtype, axes, [bucket], "cpu"), max(figures)


def _bytes(program: Compiled, params: Mapping[str, int]) -> int:
    """A running program's temporaries, results and arguments, the parameters left out."""
    stats = program.memory_analysis()
    taken = stats.temp_size_in_bytes + stats.output_size_in_bytes + stats.argument_size_in_bytes
    return int(taken - stats.alias_size_in_bytes) - sum(params.values())


def _result_bytes(program: Compiled) -> int:
    return int(program.memory_analysis().output_size_in_bytes)
