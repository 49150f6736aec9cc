"""Brings an Orbax checkpoint into device memory, slab by slab."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moorage_models.arena import Arena
from moorage_models.config import ModelConfig
from moorage_models.dtypes import numpy_dtype
from moorage_models.layouts import (
    FOLDS,
    PARTS,
    ArrayPiece,
    Row,
    StoredArray,
    stored_letters,
    stored_sizes,
)
from moorage_models.monitor import LoadMonitor
from moorage_models.placement import Layout, Placer, Sink
from moorage_models.plan import Plan
from moorage_models.zarr_chunks import SLAB_BYTES, ChunkedArray, ChunkedTree, Slab

#: Threads that decode; each holds a few slabs. More would take more than the window.
_THREADS = min(8, len(os.sched_getaffinity(0)))


def place_tree(
    plan: Plan[ArrayPiece], folder: Path, mesh: Mesh, monitor: LoadMonitor, placer: Placer
) -> dict[str, jax.Array]:
    """Loads every parameter of a plan.

    Args:
        plan: From `plan_tree`.
        folder: The Orbax checkpoint.
        mesh: The device mesh, axes Auto.
        monitor: Told of the bytes of the stage `place`.
        placer: How values come into device memory.

    Returns:
        The parameters by name, sharded as the plan says.

    Raises:
        ModelError: CHECKPOINT_CORRUPT; LOAD_CANCELLED.
    """
    sinks = {p.name: placer.sink(Layout.of(p, mesh)) for p in plan.parameters}
    targets: dict[StoredArray, list[_Target]] = {}
    for parameter in plan.parameters:
        for piece in parameter.pieces:
            target = _Target(piece, parameter.dtype, plan.config, sinks[parameter.name])
            targets.setdefault(piece.tensor, []).append(target)
    monitor.expect("place", sum(tensor.nbytes for tensor in targets))
    tree, arena = ChunkedTree(folder), Arena(2 * _THREADS * SLAB_BYTES)

    def opened(tensor: StoredArray) -> ChunkedArray:
        monitor.check()
        return tree.open(tensor, {a for target in targets[tensor] for a in target.whole_axes()})

    def pour(job: tuple[ChunkedArray, tuple[int, ...]]) -> None:
        array, start = job
        for slab in array.slabs(start, arena, monitor.check):
            for target in targets[array.tensor]:
                target.write(slab)
            monitor.advance("place", slab[1].nbytes)

    with ThreadPoolExecutor(_THREADS, "place") as pool:
        arrays = pool.map(opened, sorted(targets, key=lambda tensor: -tensor.nbytes))
        for _ in pool.map(pour, [(array, start) for array in arrays for start in array.starts]):
            pass
    return {name: sink.array() for name, sink in sinks.items()}


@dataclass(frozen=True)
class _Target:
    """What becomes of one stored array in one parameter.

    Attributes:
        piece: Which part of the array, and which layers of the parameter.
        dtype: The parameter's.
        config: The model's configuration.
        sink: The parameter.
    """

    piece: ArrayPiece
    dtype: str
    config: ModelConfig
    sink: Sink

    @property
    def letters(self) -> list[str]:
        """The letters of the stored axes."""
        return stored_letters(self.piece.row, scanned=self.piece.scanned)

    def whole_axes(self) -> Iterator[int]:
        """The axes of which a chunk has to hold all, lest its values be scattered."""
        inner = {letter for group in self.piece.row.wanted for letter in group[1:]}
        if self.piece.row.interleaved:
            inner.add("H")
        yield from (axis for axis, letter in enumerate(self.letters) if letter in inner)

    def write(self, slab: Slab) -> None:
        """Brings what a slab holds of the parameter to its place."""
        row, letters = self.piece.row, self.letters
        found = _select(slab, letters, row, self.config)
        if found is None:
            return
        starts, values = found
        letters = [letter for letter in letters if letter != "S"]
        sizes, lengths = stored_sizes(self.config), dict(zip(letters, values.shape, strict=True))
        start = tuple(_place(group, starts, sizes) for group in row.wanted)
        shape = tuple(math.prod(lengths[letter] for letter in group) for group in row.wanted)
        change = _Change.of(row, letters, self.config, self.dtype)
        if not self.piece.layers:
            self._write(start, shape, values, change)
        elif not self.piece.scanned:
            self._write((*self.piece.layers, *start), (1, *shape), values, change)
        else:
            axis, first = letters.index("L"), starts["L"]
            for layer, held in _runs(self.piece.layers[first : first + lengths["L"]]):
                part = values[(slice(None),) * axis + (held,)]
                self._write((layer, *start), (part.shape[axis], *shape), part, change)

    def _write(
        self, start: tuple[int, ...], shape: tuple[int, ...], values: np.ndarray, change: _Change
    ) -> None:
        if self.sink.holds(start, shape):
            self.sink.write(start, shape, values, change)


def _place(group: Sequence[str], starts: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Where on an axis that joins several something begins."""
    place = starts[group[0]]
    for letter in group[1:]:
        place = place * sizes[letter] + starts[letter]
    return place


def _runs(layers: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Layers that follow one another: the first, and which of those given they are."""
    first = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[i - 1] + 1:
            yield layers[first], slice(first, i)
            first = i


def _select(
    slab: Slab, letters: Sequence[str], row: Row, config: ModelConfig
) -> tuple[dict[str, int], np.ndarray] | None:
    """The part of a slab that a row wants, without the axis `S`, and where it begins there."""
    wanted: dict[str, tuple[int, int]] = {}
    if row.select is not None:
        wanted["S"] = (row.select, row.select + 1)
    if row.part:
        letter, first, last = PARTS[row.part](config)
        wanted[letter] = (first, last)
    starts, cuts = {}, []
    for letter, start, size in zip(letters, slab[0], slab[1].shape, strict=True):
        first, last = wanted.get(letter, (0, start + size))
        low, high = max(first, start), min(last, start + size)
        if low >= high:
            return None
        starts[letter] = low - first
        cuts.append(low - start if letter == "S" else slice(low - start, high - start))
    return starts, slab[1][tuple(cuts)]


@dataclass(frozen=True)
class _Change:
    """How stored values become ours.

    Attributes:
        axes: The stored axes in our order.
        interleaved: The axis along which rotary pairs lie side by side.
        fold: What was folded into the values, a key of `FOLDS`.
        config: The model's configuration, for a fold.
        dtype: The parameter's.
    """

    axes: tuple[int, ...]
    interleaved: int | None
    fold: str
    config: ModelConfig
    dtype: str

    @classmethod
    def of(cls, row: Row, letters: Sequence[str], config: ModelConfig, dtype: str) -> _Change:
        groups = [["L"]] * ("L" in letters) + row.wanted
        axes = tuple(letters.index(letter) for group in groups for letter in group)
        interleaved = letters.index("H") if row.interleaved else None
        return cls(axes, interleaved, row.fold, config, dtype)

    def __call__(self, x: Any) -> Any:
        """Changes a numpy or a jax array; axes are not joined yet."""
        if self.interleaved is not None:
            axis = self.interleaved
            pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
            x = pairs.swapaxes(axis, axis + 1).reshape(x.shape)
        if self.fold:
            x = FOLDS[self.fold](x.astype(np.float32), self.config)
        return x.transpose(self.axes).astype(numpy_dtype(self.dtype), copy=False)
