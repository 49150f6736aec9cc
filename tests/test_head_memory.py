"""What the programs hold, as their compiler says: one chunk of logits a device, never a batch's.

Presets are compiled from shapes alone. What gathers logits over the mesh would show twice: in the
temporaries, and as an array in the program's text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.stages import Compiled

from checkpoints import mesh_of
from moorage_models.config import ModelConfig
from moorage_models.families import PRESETS
from moorage_models.plan import preset_plan
from moorage_server.engine import Bucket, outputs
from moorage_server.engine.head import CHUNK
from moorage_server.engine.outputs import PROFILES, Logits, Profile, served
from moorage_server.engine.programs import (
    compile_lowered,
    lower_gather,
    lower_head,
    lower_trunk,
)

Sizes = tuple[int, int]  # fsdp, tp

TOP_20 = Profile(("logprobs", "entropy", "top_k"), 32)
SMALL = 640  # a chunk's hidden states and results, and what is reduced over tp, in values a token

#: Vocabulary, and the cap of the logits.
MODELS = [(151_936, None), (151_936, 30.0), (262_144, None), (262_144, 30.0)]
SLOW_MESHES = [
    pytest.param(sizes, marks=pytest.mark.soak)
    for sizes in [(1, 2), (2, 1), (4, 1), (2, 4), (1, 8)]
]


def config_of(vocabulary: int, cap: float | None, width: int = 640) -> ModelConfig:
    """Two layers of Qwen3, with another head."""
    return replace(
        PRESETS["qwen3_0p6b"],
        num_layers=2,
        embed_dim=width,
        vocab_size=vocabulary,
        final_softcap=cap,
    )


def head_of(
    config: ModelConfig, sizes: Sizes, profile: Profile = TOP_20, dtype: str = "float32"
) -> Compiled:
    mesh = mesh_of(*sizes)
    return compile_lowered(lower_head(preset_plan(config, dtype), mesh, profile), mesh)


def arrays(program: Compiled) -> set[tuple[int, ...]]:
    """The shape of every array that a program's text names."""
    found = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program.as_text())
    return {tuple(map(int, sizes.split(","))) for sizes in found}


def logits_bound(config: ModelConfig, sizes: Sizes) -> float:
    """A chunk's logits on each device, a fifth more, and what is small."""
    fsdp, tp = sizes
    small = CHUNK * (fsdp * SMALL + config.embed_dim) * 4
    return 1.2 * CHUNK * config.vocab_size // tp * 4 + small


def holders(config: ModelConfig, sizes: Sizes, program: Compiled) -> Iterator[tuple[int, ...]]:
    """Arrays of more than one device's logits of one chunk, but for its part of the table."""
    fsdp, tp = sizes
    own = config.vocab_size // tp
    for shape in arrays(program):
        if _count(shape) > CHUNK * own and shape != (own // fsdp, config.embed_dim):
            yield shape


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (2, 2), *SLOW_MESHES], ids=str)
@pytest.mark.parametrize(("vocabulary", "cap"), MODELS)
def test_a_head_holds_one_chunk_of_its_own_logits(
    vocabulary: int, cap: float | None, sizes: Sizes, dtype: str
) -> None:
    """And no second copy of its part of the table, gathered or cast."""
    config = config_of(vocabulary, cap)
    program = head_of(config, sizes, dtype=dtype)
    assert program.memory_analysis().temp_size_in_bytes <= logits_bound(config, sizes)
    assert list(holders(config, sizes, program)) == []


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("profile", [p for p in PROFILES if "logits" not in p.outputs], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize(("vocabulary", "cap"), MODELS)
def test_every_program_of_the_head(
    vocabulary: int, cap: float | None, sizes: Sizes, profile: Profile, dtype: str
) -> None:
    config = config_of(vocabulary, cap, 2048)
    if profile in served(config):
        program = head_of(config, sizes, profile, dtype)
        room = CHUNK * sizes[0] * 4 * 4 * profile.size * sizes[1]
        assert program.memory_analysis().temp_size_in_bytes <= logits_bound(config, sizes) + room
        assert list(holders(config, sizes, program)) == []


def test_a_search_of_all_logits_at_once_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the partitioner does when it is not told that each device searches its own part."""

    def everywhere(logits: Logits) -> tuple[jax.Array, ...]:
        values, ids = jax.lax.top_k(logits.values, logits.size)
        return ids, values - logits.log_sum[..., None]

    plain = replace(outputs.OUTPUTS["top_k"], compute=everywhere)
    monkeypatch.setitem(outputs.OUTPUTS, "top_k", plain)
    config = config_of(151_936, None)
    program = head_of(config, (1, 4))
    assert program.memory_analysis().temp_size_in_bytes > logits_bound(config, (1, 4))
    assert list(holders(config, (1, 4), program))


def test_a_second_array_of_logits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def sorted_whole(logits: Logits) -> tuple[jax.Array, ...]:
        ordered = jnp.sort(logits.values, axis=-1)[..., ::-1]
        return ordered[..., : logits.size].astype(jnp.int32), ordered[..., : logits.size]

    monkeypatch.setitem(
        outputs.OUTPUTS, "top_k", replace(outputs.OUTPUTS["top_k"], compute=sorted_whole)
    )
    config = config_of(151_936, None)
    assert head_of(config, (1, 1)).memory_analysis().temp_size_in_bytes > logits_bound(
        config, (1, 1)
    )


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (1024, (1, 1)),
        (4096, (2, 2)),
        *(
            pytest.param(length, sizes, marks=pytest.mark.soak)
            for length in (1024, 2048, 8192, 32_768)
            for sizes in ((1, 1), (1, 4), (2, 2))
        ),
    ],
    ids=str,
)
def test_nothing_is_as_large_as_the_logits_of_a_batch(length: int, sizes: Sizes) -> None:
    """Neither `[rows, length, V]` nor the same flattened, as a whole or a device's part of it."""
    config, mesh = config_of(151_936, 30.0), mesh_of(*sizes)
    plan, bucket = preset_plan(config, "float32"), Bucket(length, 2 * sizes[0])
    trunk = compile_lowered(lower_trunk(plan, "float32", mesh, bucket), mesh, is_trunk=True)
    gather = compile_lowered(lower_gather(plan, mesh, bucket), mesh)
    own = config.vocab_size // sizes[1]
    tokens = {bucket.rows, length, bucket.rows * length, 2 * length}
    for program in (trunk, gather, head_of(config, sizes)):
        both = [s for s in arrays(program) if {own, config.vocab_size} & set(s) and tokens & {*s}]
        assert [shape for shape in both if _count(shape) > CHUNK * own] == []
    for program in (trunk, gather):  # they have no use for the vocabulary but the table's rows
        assert all(config.embed_dim in s for s in arrays(program) if config.vocab_size in s)
    assert any(bucket.rows // sizes[0] in s and length in s for s in arrays(trunk))
