"""Cuts a load into reads, and fills what several devices hold of a tensor from one of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moorage_models.arena import Arena
from moorage_models.dtypes import ITEM_BYTES, numpy_dtype
from moorage_models.headers import StoredTensor
from moorage_models.monitor import LoadMonitor
from moorage_models.plan import Piece
from moorage_models.reading import READ_BYTES, Reader

#: A part of a parameter, one (start, stop) an axis.
Bounds = tuple[tuple[int, int], ...]

#: Host arrays by the parts of a parameter that they are for.
Parts = Mapping[Bounds, np.ndarray]


@dataclass(frozen=True)
class Band:
    """Rows of one stored tensor, whose bytes lie in one run.

    Attributes:
        tensor: The tensor.
        index: Its place on its parameter's leading axes.
        start: The first row.
        stop: The row after the last.
    """

    tensor: StoredTensor
    index: tuple[int, ...]
    start: int
    stop: int

    @property
    def offset(self) -> int:
        """Where in the file it begins."""
        return self.tensor.offset + self.start * _row_bytes(self.tensor)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return (self.stop - self.start) * _row_bytes(self.tensor)


def bands(pieces: Iterable[Piece], parts: Iterable[Bounds]) -> Iterator[Band]:
    """The reads that fill some parts of a parameter; rows that no part holds are left out.

    Args:
        pieces: The parameter's tensors.
        parts: The parts. On a piece's first own axis they are disjoint or the same.
    """
    parts = list(parts)
    for piece in pieces:
        tensor, axis = piece.tensor, len(piece.index)
        ranges = {part[axis] for part in parts if holds(part, piece.index)}
        step = max(1, READ_BYTES // max(1, _row_bytes(tensor)))
        for start, stop in _joined(ranges):
            for row in range(start, stop, step):
                yield Band(tensor, piece.index, row, min(row + step, stop))


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that follow one another made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def boxes(shape: Sequence[int], limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts an array into boxes that are runs of it, in order.

    Args:
        shape: The array's shape.
        limit: Values that a box may hold, if one place on the last axis is not more.

    Returns:
        Where each begins, and its shape.
    """
    sizes = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = next(i for i, size in enumerate(sizes) if size <= max(limit, 1))
    step = max(1, min(shape[axis], limit // sizes[axis]))
    starts = [range(size) for size in shape[:axis]] + [range(0, shape[axis], step)]
    for start in itertools.product(*starts):
        box = (1,) * axis + (min(step, shape[axis] - start[-1]), *shape[axis + 1 :])
        yield start + (0,) * (len(shape) - len(start)), box


def overlap(
    bounds: Bounds, start: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a part of a parameter and a box of it meet.

    Args:
        bounds: The part.
        start: Where the box begins.
        shape: The shape of the box.

    Returns:
        The place within the part, and within the box; None if they do not meet.
    """
    axes = list(zip(bounds, start, shape, strict=True))
    meets = [(max(first, s), min(last, s + size)) for (first, last), s, size in axes]
    if any(low >= high for low, high in meets):
        return None
    into = zip(meets, bounds, strict=True)
    of = zip(meets, start, strict=True)
    return (
        tuple(slice(low - first, high - first) for (low, high), (first, _) in into),
        tuple(slice(low - s, high - s) for (low, high), s in of),
    )


def allocate(arena: Arena, parts: Iterable[Bounds], dtype: str) -> dict[Bounds, np.ndarray]:
    """Host memory for parts of a parameter, each once, in the parameter's dtype."""
    kind = numpy_dtype(dtype)
    arrays = {}
    for part in set(parts):
        shape = [stop - start for start, stop in part]
        arrays[part] = arena.allocate(math.prod(shape) * kind.itemsize).view(kind).reshape(shape)
    return arrays


def fill(band: Band, parts: Parts, reader: Reader, monitor: LoadMonitor) -> None:
    """Reads a band once, and copies it to every part that holds some of it.

    Args:
        band: What to read.
        parts: The parts of the band's parameter, in the parameter's dtype.
        reader: The files.
        monitor: Told of the bytes of the stage `place`.

    Raises:
        ModelError: CHECKPOINT_CORRUPT; LOAD_CANCELLED.
    """
    monitor.check()
    _copy(band, parts, reader)
    monitor.advance("place", band.nbytes)


def _copy(band: Band, parts: Parts, reader: Reader) -> None:
    tensor, targets = band.tensor, _targets(band, parts)
    stored = numpy_dtype(tensor.dtype)
    as_stored = all(t.dtype == stored for group in targets.values() for t, _ in group)
    if as_stored and all(_tile([c for _, c in g], tensor.shape[1:]) for g in targets.values()):
        groups = [_as_rows([target for target, _ in group]) for group in targets.values()]
        reader.scatter(tensor.file, band.offset, groups)
        return
    run = reader.lend(tensor.file, band.offset, band.nbytes).view(stored)
    rows = run.reshape(band.stop - band.start, *tensor.shape[1:])
    for (start, stop), group in targets.items():
        for target, where in group:
            part = rows[(slice(start - band.start, stop - band.start), *where)]
            target[...] = part.astype(target.dtype, copy=False)


def _tile(columns: Sequence[tuple[slice, ...]], shape: Sequence[int]) -> bool:
    """Whether ranges of columns, in order, make up whole rows."""
    if len(columns) == 1:
        return [(c.start, c.stop) for c in columns[0]] == [(0, size) for size in shape]
    if len(shape) != 1:
        return False
    edges = [edge for (part,) in columns for edge in (part.start, part.stop)]
    return edges[::2] == [0, *edges[1:-1:2]] and edges[-1] == shape[0]


def _targets(
    band: Band, parts: Parts
) -> dict[tuple[int, int], list[tuple[np.ndarray, tuple[slice, ...]]]]:
    """What the parts hold of a band.

    Returns:
        By ranges of the tensor's rows, in order: the rows of each part that holds some of them,
        and which columns those are.
    """
    axis = len(band.index)
    targets: dict[tuple[int, int], list[tuple[np.ndarray, tuple[slice, ...]]]] = {}
    for bounds, array in sorted(parts.items()):
        first, last = bounds[axis]
        start, stop = max(first, band.start), min(last, band.stop)
        if start < stop and holds(bounds, band.index):
            place = tuple(i - low for i, (low, _) in zip(band.index, bounds, strict=False))
            columns = tuple(slice(*pair) for pair in bounds[axis + 1 :])
            rows = array[place][start - first : stop - first]
            targets.setdefault((start, stop), []).append((rows, columns))
    return dict(sorted(targets.items()))


def holds(bounds: Bounds, index: Sequence[int]) -> bool:
    """Whether a part of a parameter has some of the piece at `index`."""
    return all(start <= i < stop for (start, stop), i in zip(bounds, index, strict=False))


def _row_bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape[1:]) * ITEM_BYTES[tensor.dtype]


def _as_rows(columns: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The bytes of arrays side by side; an array that is alone is one row."""
    if len(columns) == 1:
        return [columns[0].reshape(1, -1).view(np.uint8)]
    return [array.view(np.uint8) for array in columns]
