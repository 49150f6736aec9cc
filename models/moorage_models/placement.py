"""Reads the bytes that each device holds into that device's memory."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moorage_models.dtypes import ITEM_BYTES, numpy_dtype
from moorage_models.errors import ModelError, Reason
from moorage_models.headers import StoredTensor
from moorage_models.monitor import LoadMonitor
from moorage_models.ops import partition
from moorage_models.plan import Piece, Plan, PlannedParameter

_BAND_BYTES = 8 << 20
_THREADS = 4

#: A shard's slice of the whole array, one (start, stop) an axis.
Bounds = tuple[tuple[int, int], ...]


def place(
    plan: Plan[Piece], folder: Path, mesh: Mesh, monitor: LoadMonitor
) -> dict[str, jax.Array]:
    """Loads every parameter of a plan, each device reading its own part only.

    Args:
        plan: What to load.
        folder: Where the plan's files are.
        mesh: The device mesh, axes Auto.
        monitor: Told of the bytes of the stage `place`.

    Returns:
        The parameters by name, sharded as the plan says.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if a file is shorter than its header stated;
            CHECKPOINT_MISMATCH if a stored tied head differs from the embedding; LOAD_CANCELLED.
    """
    pieces = [piece for parameter in plan.parameters for piece in parameter.pieces]
    monitor.expect("place", sum(piece.tensor.nbytes for piece in pieces))
    with _Files(folder) as files, ThreadPoolExecutor(_THREADS, "place") as pool:
        params = {}
        for parameter in plan.parameters:
            params[parameter.name] = _place_one(parameter, files, mesh, pool, monitor)
        for tensor, name in plan.duplicates:
            source = next(p for p in plan.parameters if p.name == name).pieces[0].tensor
            _check_equal(tensor, source, files, monitor)
        return params


class _Files:
    """The open files of one load."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, name: str, offset: int, target: np.ndarray) -> None:
        """Fills a contiguous array of bytes from a file."""
        view, done = memoryview(target.data).cast("B"), 0
        try:
            while done < len(view):
                count = os.preadv(self._descriptor(name), [view[done:]], offset + done)
                if count == 0:
                    raise _corrupt(f"{name} ends before its tensors do")
                done += count
        except OSError as error:
            raise _corrupt(f"{name} cannot be read: {error.strerror}") from error

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._open:
                self._open[name] = os.open(self._folder / name, os.O_RDONLY)
            return self._open[name]


@dataclass(frozen=True)
class _Band:
    """Rows `start .. stop` of one stored tensor, whose bytes lie in one run."""

    tensor: StoredTensor
    index: tuple[int, ...]
    start: int
    stop: int


def _place_one(
    parameter: PlannedParameter[Piece],
    files: _Files,
    mesh: Mesh,
    pool: ThreadPoolExecutor,
    monitor: LoadMonitor,
) -> jax.Array:
    spec = partition(parameter.spec(dict(mesh.shape)))
    sharding = NamedSharding(mesh, spec)
    indices = sharding.addressable_devices_indices_map(parameter.shape)
    bounds = {d: _bounds(index or (), parameter.shape) for d, index in indices.items()}
    dtype = numpy_dtype(parameter.dtype)
    shards = {b: np.empty([stop - start for start, stop in b], dtype) for b in bounds.values()}

    def fill(band: _Band) -> None:
        monitor.check()
        monitor.advance("place", _fill(band, shards, files))

    for _ in pool.map(fill, _bands(parameter, list(shards))):
        pass
    arrays = [jax.device_put(shards[bounds[device]], device) for device in indices]
    return jax.make_array_from_single_device_arrays(parameter.shape, sharding, arrays)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _bands(parameter: PlannedParameter[Piece], shards: list[Bounds]) -> Iterator[_Band]:
    """Bands of rows in the order of the files; rows that no shard here holds are left out."""
    for piece in sorted(parameter.pieces, key=lambda p: (p.tensor.file, p.tensor.offset)):
        tensor, axis = piece.tensor, len(piece.index)
        ranges = {b[axis] for b in shards if _holds(b, piece.index)}
        row_bytes = math.prod(tensor.shape[1:]) * ITEM_BYTES[tensor.dtype]
        step = max(1, _BAND_BYTES // max(1, row_bytes))
        for start, stop in sorted(ranges):
            for row in range(start, stop, step):
                yield _Band(tensor, piece.index, row, min(row + step, stop))


def _holds(bounds: Bounds, index: tuple[int, ...]) -> bool:
    return all(start <= i < stop for (start, stop), i in zip(bounds, index, strict=False))


def _fill(band: _Band, shards: dict[Bounds, np.ndarray], files: _Files) -> int:
    """Reads a band once and copies it to every shard that holds some of it."""
    tensor, axis = band.tensor, len(band.index)
    row_bytes = math.prod(tensor.shape[1:]) * ITEM_BYTES[tensor.dtype]
    offset = tensor.offset + band.start * row_bytes
    targets = []
    for bounds, shard in shards.items():
        first, last = bounds[axis]
        if _holds(bounds, band.index) and first <= band.start and band.stop <= last:
            place = tuple(i - start for i, (start, _) in zip(band.index, bounds, strict=False))
            columns = tuple(slice(*pair) for pair in bounds[axis + 1 :])
            targets.append((shard[place][band.start - first : band.stop - first], columns))
    stored = numpy_dtype(tensor.dtype)
    whole = (band.stop - band.start, *tensor.shape[1:])
    if len(targets) == 1 and targets[0][0].shape == whole and targets[0][0].dtype == stored:
        files.read(tensor.file, offset, _as_bytes(targets[0][0]))
    else:
        rows = np.empty(whole, stored)
        files.read(tensor.file, offset, _as_bytes(rows))
        for target, columns in targets:
            target[...] = rows[(slice(None), *columns)].astype(target.dtype, copy=False)
    return math.prod(whole) * stored.itemsize


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint8).reshape(-1)


def _check_equal(
    one: StoredTensor, other: StoredTensor, files: _Files, monitor: LoadMonitor
) -> None:
    """Compares two stored tensors byte by byte, a band at a time."""
    equal = one.shape == other.shape and one.dtype == other.dtype
    for start in range(0, one.nbytes if equal else 0, _BAND_BYTES):
        monitor.check()
        size = min(_BAND_BYTES, one.nbytes - start)
        bands = np.empty((2, size), np.uint8)
        for band, tensor in zip(bands, (one, other), strict=True):
            files.read(tensor.file, tensor.offset + start, band)
        equal = equal and bool(np.array_equal(bands[0], bands[1]))
    if not equal:
        raise ModelError(
            Reason.CHECKPOINT_MISMATCH,
            f"the config ties the head to the embedding, but {one.name} differs from {other.name}",
        )


def _corrupt(message: str) -> ModelError:
    return ModelError(Reason.CHECKPOINT_CORRUPT, message)
