"""Recycled memory: used again only when nothing refers to it, and bounded."""

from __future__ import annotations

import gc
import hashlib
import random
import subprocess
import sys

import jax
import numpy as np
import pytest

from checkpoints import GOLDEN, mesh_of, open_folder
from moorage_models.arena import Arena
from moorage_models.automodel import load
from moorage_models.placement import ArenaPlacer

MIB = 1 << 20


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def test_memory_is_used_again_once_its_last_view_is_gone() -> None:
    arena = Arena(8 * MIB)
    first = arena.allocate(2 * MIB)
    where, view = address(first), first[5:10].view(np.uint8)
    del first
    other = arena.allocate(2 * MIB)
    assert address(other) != where
    del view
    assert address(arena.allocate(2 * MIB)) == where


def test_what_is_kept_is_bounded_and_neighbours_join() -> None:
    arena = Arena(3 * MIB)
    whole = arena.allocate(3 * MIB)
    where = address(whole)
    del whole
    assert arena.kept == 3 * MIB
    parts = [arena.allocate(MIB) for _ in range(3)]
    assert arena.kept == 0
    del parts
    assert address(arena.allocate(3 * MIB)) == where
    rest = [arena.allocate(2 * MIB) for _ in range(4)]
    del rest
    assert arena.kept == 3 * MIB


def test_an_arena_that_keeps_nothing_gives_all_back() -> None:
    arena = Arena()
    array = arena.allocate(4 * MIB)
    array[:] = 1
    del array
    assert arena.kept == 0


@pytest.mark.parametrize("nbytes", [1, 1000, 256 << 10, MIB + 1])
def test_memory_is_aligned_for_devices(nbytes: int) -> None:
    array = Arena().allocate(nbytes)
    assert (array.shape, address(array) % 64) == ((nbytes,), 0)


def test_devices_take_the_memory_without_a_copy_and_keep_it() -> None:
    arena = Arena(8 * MIB)
    host = arena.allocate(2 * MIB)
    host[:] = 7
    where = address(host)
    host.flags.writeable = False
    array = jax.device_put(host, jax.devices()[3])
    assert array.unsafe_buffer_pointer() == where
    del host
    gc.collect()
    other = arena.allocate(2 * MIB)
    other[:] = 9
    assert address(other) != where
    assert (np.asarray(array) == 7).all()
    del array
    gc.collect()
    assert address(arena.allocate(2 * MIB)) == where


def test_a_process_may_end_while_devices_compute() -> None:
    code = """
import jax, numpy as np
from moorage_models.arena import Arena
host = Arena().allocate(64 << 20)
host[:] = 0
host.flags.writeable = False
x = jax.device_put(host.view(np.float32).reshape(4096, 4096))
x.block_until_ready()
y = jax.jit(lambda x: x @ x @ x @ x)(x)
"""
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def digest(params: dict[str, jax.Array]) -> str:
    content = hashlib.sha256()
    for name in sorted(params):
        for shard in params[name].addressable_shards:
            content.update(np.asarray(shard.data).tobytes())
    return content.hexdigest()


def test_live_models_keep_their_bits_while_freed_memory_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moorage_models.arena._MIN_BYTES", 1)  # golden models are small
    arena, chance = Arena(64 * MIB), random.Random(0)
    names = ["gemma2", "llama3", "qwen3_tied", "qwen3_moe"]
    wanted = {n: digest(load(open_folder(GOLDEN / n), mesh_of(2, 2))[0]) for n in names}
    live: dict[str, dict[str, jax.Array]] = {}
    for _ in range(24):
        name = chance.choice(names)
        if live.pop(name, None) is None:
            checkpoint = open_folder(GOLDEN / name)
            live[name] = load(checkpoint, mesh_of(2, 2), placer=ArenaPlacer(arena))[0]
        for size in (4096, 64 << 10, MIB):
            arena.allocate(size)[:] = 255
        assert all(digest(params) == wanted[n] for n, params in live.items())
