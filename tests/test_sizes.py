"""Presets at their real size, compiled from shapes alone on virtual devices.

The figures are the CPU compiler's. `make presets` prints them for every preset.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, Mesh

from moorage_models.families import PRESETS
from moorage_models.plan import preset_plan
from moorage_server.engine import Bucket
from moorage_server.engine.head import CHUNK
from moorage_server.engine.outputs import OUTPUTS, Profile
from moorage_server.engine.programs import compile_lowered, lower_head, lower_trunk

GIB = 2**30


def mesh_of(**sizes: int) -> Mesh:
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def temporaries(preset: str, bucket: Bucket, mesh: Mesh) -> int:
    lowered = lower_trunk(preset_plan(PRESETS[preset]), "bfloat16", mesh, bucket)
    memory = compile_lowered(lowered, mesh, is_trunk=True).memory_analysis()
    return int(memory.temp_size_in_bytes)


def test_long_rows_need_no_square_of_scores() -> None:
    held = temporaries("qwen3_8b", Bucket(32_768, 1), mesh_of(fsdp=1, tp=8))
    assert held <= 3 * GIB  # [heads, T, T] in float32 would be 16 GiB a device


def test_experts_need_no_row_for_each_of_them() -> None:
    config, tokens = PRESETS["qwen3_30b_a3b"], 8192
    held = temporaries("qwen3_30b_a3b", Bucket(tokens, 1), mesh_of(fsdp=1, tp=8))
    assert held <= 2 * tokens * config.experts_per_token * config.embed_dim * 2  # bfloat16


@pytest.mark.parametrize("preset", ["gemma3_27b_it", "qwen2p5_7b", "llama3p1_70b"])
def test_a_device_is_given_what_the_plan_says(preset: str) -> None:
    mesh = mesh_of(fsdp=2, tp=4)
    plan = preset_plan(PRESETS[preset])
    lowered = lower_trunk(plan, "bfloat16", mesh, Bucket(128, 2))
    arguments = (
        compile_lowered(lowered, mesh, is_trunk=True).memory_analysis().argument_size_in_bytes
    )
    head = (
        0
        if plan.config.tied
        else next(p.device_bytes(dict(mesh.shape)) for p in plan.parameters if p.name == "head")
    )
    ids = 3 * 128 * 4  # tokens, segments and positions of one row
    depth = 4  # how many layers are run
    assert arguments == plan.device_bytes(dict(mesh.shape)) - head + ids + depth


def test_the_head_holds_one_chunk_of_logits() -> None:
    plan = preset_plan(PRESETS["qwen3_4b"])
    mesh = mesh_of(fsdp=1, tp=1)
    program = compile_lowered(lower_head(plan, mesh, Profile(("logprobs",))), mesh)
    chunk = CHUNK * plan.config.vocab_size * 4
    weight = plan.config.vocab_size * plan.config.embed_dim * 4  # the table in float32
    assert program.memory_analysis().temp_size_in_bytes <= 1.2 * chunk + weight
    assert "logits" in OUTPUTS


@pytest.mark.timeout(300)
def test_the_largest_preset_compiles_within_two_gib_on_256_devices() -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "presets.py"
    command = [sys.executable, str(script), "llama3p1_405b", "--mesh", "fsdp=16,tp=16"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "405,853,388,800" in output
    peak = float(re.search(r"peak memory of this process ([\d.]+) GiB", output)[1])
    assert peak < 2
