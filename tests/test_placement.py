"""Placement: each device gets its slice of the files, bit for bit, and each byte is read once."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import ml_dtypes
import numpy as np
import pytest

from checkpoints import GOLDEN, mesh_of, open_folder, stored_tensors
from moorage_models import automodel, bands, reading
from moorage_models.arena import Arena
from moorage_models.automodel import load
from moorage_models.checkpoint import Checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor, Stage
from moorage_models.placement import ArenaPlacer, Placer
from moorage_models.reading import LocalFiles
from moorage_models.ring import RingPlacer
from moorage_models.sharding import shard_shape

VARIANTS = [
    "gemma1_mqa",
    "gemma2",
    "gemma3_mm_4b",
    "gemma3_mm_27b",
    "llama3_oddvocab",
    "llama3_mixed_dtype",
    "llama3_reward",
    "qwen2p5_untied",
    "qwen3_f16",
    "qwen3_f32",
    "qwen3_tied",
    "qwen3_moe",
]
MESHES = [(1, 1), (2, 2), (1, 8), (8, 1), (4, 2)]
#: Without a head that is stored twice, which is read to be compared.
ONCE = ["gemma2", "qwen3_moe", "llama3_oddvocab", "llama3_mixed_dtype", "gemma3_mm_27b"]
PLACERS = {"arena": ArenaPlacer(Arena()), "ring": RingPlacer()}
BOTH = pytest.mark.parametrize("placer", PLACERS.values(), ids=PLACERS)
#: In the suite each placer has some meshes, and both have the one with two axes.
QUICK = {("arena", (1, 1)), ("arena", (8, 1)), ("ring", (1, 8)), *((p, (4, 2)) for p in PLACERS)}
EVERYWHERE = pytest.mark.parametrize(
    ("mesh", "placer"),
    [
        pytest.param(mesh, placer, marks=() if (name, mesh) in QUICK else pytest.mark.soak)
        for mesh in MESHES
        for name, placer in PLACERS.items()
    ],
    ids=[f"{mesh}-{name}" for mesh in MESHES for name in PLACERS],
)


class Spy(LocalFiles):
    """Notes what is read, and may do something before each read."""

    reads: ClassVar[list[tuple[str, int, int]]]
    before: ClassVar[Callable[[], None]]

    def read(self, name: str, offset: int, target: np.ndarray) -> None:
        self.note(name, offset, len(target))
        super().read(name, offset, target)

    def scatter(self, name: str, offset: int, groups: Sequence[Sequence[np.ndarray]]) -> None:
        self.note(name, offset, sum(array.size for group in groups for array in group))
        super().scatter(name, offset, groups)

    def lend(self, name: str, offset: int, nbytes: int) -> np.ndarray:
        self.note(name, offset, nbytes)
        return super().lend(name, offset, nbytes)

    def note(self, name: str, offset: int, nbytes: int) -> None:
        self.before()
        self.reads.append((name, offset, offset + nbytes))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    monkeypatch.setattr(Spy, "reads", [], raising=False)
    monkeypatch.setattr(Spy, "before", lambda _: None, raising=False)
    monkeypatch.setattr(automodel, "LocalFiles", Spy)
    return Spy


def whole_parameters(checkpoint: Checkpoint, folder: Path) -> dict[str, np.ndarray]:
    """Every parameter as the safetensors library reads its tensors, stacked."""
    tensors = stored_tensors(folder)
    whole = {}
    for parameter in checkpoint.plan.parameters:
        pieces = [tensors[piece.tensor.name] for piece in parameter.pieces]
        dtype = np.result_type(*pieces) if len({x.dtype for x in pieces}) > 1 else pieces[0].dtype
        whole[parameter.name] = np.empty(parameter.shape, dtype)
        for piece, tensor in zip(parameter.pieces, pieces, strict=True):
            whole[parameter.name][piece.index] = tensor
    return whole


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def check_shards(
    checkpoint: Checkpoint,
    params: dict[str, jax.Array],
    mesh: tuple[int, int],
    wanted: dict[str, np.ndarray],
) -> None:
    sizes = {"fsdp": mesh[0], "tp": mesh[1]}
    assert params.keys() == wanted.keys()
    for parameter in checkpoint.plan.parameters:
        name, value = parameter.name, params[parameter.name]
        assert (value.shape, value.dtype) == (wanted[name].shape, wanted[name].dtype)
        assert len(value.addressable_shards) == mesh[0] * mesh[1]
        assert not value.aval.weak_type
        part = shard_shape(parameter.shape, parameter.spec(sizes), sizes)
        for shard in value.addressable_shards:
            assert shard.data.shape == part
            held = np.asarray(shard.data)
            assert (bits(held) == bits(wanted[name][shard.index])).all(), (name, shard.index)


@EVERYWHERE
@pytest.mark.parametrize("name", VARIANTS)
def test_every_device_holds_its_slice(name: str, mesh: tuple[int, int], placer: Placer) -> None:
    checkpoint = open_folder(GOLDEN / name)
    params, path = load(checkpoint, mesh_of(*mesh), placer=placer)
    assert path == str(GOLDEN / name)
    check_shards(checkpoint, params, mesh, whole_parameters(checkpoint, GOLDEN / name))


@EVERYWHERE
@pytest.mark.parametrize("name", ["llama3_oddvocab", "qwen3_moe"])
def test_tensors_longer_than_a_band(
    name: str, mesh: tuple[int, int], placer: Placer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands of a few rows, and reads that return less than was asked for."""
    preadv = os.preadv

    def short_preadv(file: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        return preadv(file, [buffers[0][:100]], offset, *flags)

    monkeypatch.setattr(bands, "READ_BYTES", 500)
    monkeypatch.setattr(os, "preadv", short_preadv)
    monkeypatch.setattr(reading, "_PREADV", lambda *_: 100)
    checkpoint = open_folder(GOLDEN / name)
    params, _ = load(checkpoint, mesh_of(*mesh), placer=placer)
    check_shards(checkpoint, params, mesh, whole_parameters(checkpoint, GOLDEN / name))


@EVERYWHERE
@pytest.mark.parametrize("name", ONCE)
def test_every_byte_is_read_once_and_counted(
    name: str, mesh: tuple[int, int], placer: Placer, spy: type[Spy]
) -> None:
    """Vision tensors, headers and other files are not read at all."""
    checkpoint, monitor = open_folder(GOLDEN / name), LoadMonitor()
    load(checkpoint, mesh_of(*mesh), monitor, placer)
    needed = sum(
        tensor.nbytes
        for key, tensor in stored_tensors(GOLDEN / name).items()
        if "vision" not in key and "projector" not in key
    )
    for (file, _, stop), (other, start, _) in itertools.pairwise(sorted(spy.reads)):
        assert file != other or stop <= start
    assert sum(stop - start for _, start, stop in spy.reads) == needed
    stage = monitor.stages()["place"]
    assert (stage.done, stage.total) == (needed, needed)


@BOTH
@pytest.mark.parametrize("mesh", [(4, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gemma2", "qwen3_f16", "qwen3_f32", "llama3_mixed_dtype"])
def test_parameters_are_cast_as_they_are_loaded(
    name: str, dtype: str, mesh: tuple[int, int], placer: Placer
) -> None:
    checkpoint = open_folder(GOLDEN / name, dtype)
    params, _ = load(checkpoint, mesh_of(*mesh), placer=placer)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    whole = whole_parameters(checkpoint, GOLDEN / name)
    check_shards(checkpoint, params, mesh, {key: x.astype(kind) for key, x in whole.items()})


def test_parameters_do_not_change_with_the_file(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "qwen3_f32", tmp_path / "model"))
    checkpoint = open_folder(folder)
    params, _ = load(checkpoint, mesh_of(1, 2))
    wanted = whole_parameters(checkpoint, folder)
    file = folder / "model.safetensors"
    with open(file, "r+b") as writer:
        writer.write(bytes(file.stat().st_size))
    check_shards(checkpoint, params, (1, 2), wanted)


def refusal(checkpoint: Checkpoint, monitor: LoadMonitor | None = None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(checkpoint, mesh_of(2, 2), monitor)
    return caught.value


def test_a_cancelled_load_stops_before_it_reads(spy: type[Spy]) -> None:
    monitor = LoadMonitor()
    monitor.cancel()
    assert refusal(open_folder(GOLDEN / "llama3"), monitor).reason is Reason.LOAD_CANCELLED
    assert spy.reads == []


def test_a_load_is_cancelled_between_bands(spy: type[Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "READ_BYTES", 500)
    monitor = LoadMonitor()
    monkeypatch.setattr(spy, "before", lambda self: len(self.reads) >= 19 and monitor.cancel())
    assert refusal(open_folder(GOLDEN / "llama3"), monitor).reason is Reason.LOAD_CANCELLED
    assert len(spy.reads) < 30  # those of the other threads may be under way
    assert 0 < monitor.stages()["place"].done < monitor.stages()["place"].total


@pytest.mark.parametrize("size", [0, 100_000])
def test_a_file_that_was_cut_since_is_corrupt(size: int, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "model"))
    checkpoint = open_folder(folder)
    os.truncate(folder / "model.safetensors", size)
    error = refusal(checkpoint)
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert "model.safetensors" in error.message
    assert str(tmp_path) not in error.message


def test_a_file_that_was_removed_since_is_corrupt(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "model"))
    checkpoint = open_folder(folder)
    (folder / "model.safetensors").unlink()
    error = refusal(checkpoint)
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert str(tmp_path) not in error.message


def test_a_file_that_is_replaced_while_it_is_read_is_corrupt(
    tmp_path: Path, spy: type[Spy], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "model"))
    file = folder / "model.safetensors"

    once = threading.Lock()

    def replace(self: Spy) -> None:
        if len(self.reads) >= 5 and once.acquire(blocking=False):
            (tmp_path / "other").write_bytes(file.read_bytes())
            os.replace(tmp_path / "other", file)

    monkeypatch.setattr(spy, "before", replace)
    error = refusal(open_folder(folder))
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert "changed" in error.message


def test_a_failed_load_leaves_no_file_open(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "model"))
    checkpoint = open_folder(folder)
    os.truncate(folder / "model.safetensors", 100_000)
    refusal(checkpoint)
    links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    assert not any(link.startswith(str(folder)) for link in links)


def test_a_monitor_counts_its_stages_apart() -> None:
    monitor = LoadMonitor()
    monitor.expect("fetch", 10)
    monitor.advance("fetch", 4)
    monitor.expect("place", 5)
    monitor.advance("place", 5)
    stages = monitor.stages()
    assert (stages["fetch"].done, stages["fetch"].total) == (4, 10)
    assert (stages["place"].done, stages["place"].total) == (5, 5)
    assert Stage(done=6, total=8, seconds=2.0).rate == 3.0
    assert Stage().rate == 0.0
    monitor.cancel()
    with pytest.raises(ModelError, match="LOAD_CANCELLED"):
        monitor.advance("fetch", 1)
    assert monitor.stages()["fetch"].done == 4
