"""Reads the bytes that each device holds into that device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moorage_models.arena import Arena
from moorage_models.bands import Bounds, Parts, allocate, bands, fill, overlap
from moorage_models.errors import ModelError, Reason
from moorage_models.headers import StoredTensor
from moorage_models.monitor import LoadMonitor
from moorage_models.ops import partition
from moorage_models.plan import Piece, Plan, PlannedParameter
from moorage_models.reading import READ_BYTES, Reader

#: A part of an array, one slice an axis; None for one without axes.
Index = tuple[slice, ...] | None

#: What is done to stored values, numpy's or jax's. It is hashable.
Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Layout:
    """How one parameter lies on the devices of this process.

    Attributes:
        parameter: The parameter.
        sharding: How it is split.
        bounds: What each device holds.
    """

    parameter: PlannedParameter[Any]
    sharding: NamedSharding
    bounds: dict[Any, Bounds]

    @classmethod
    def of(cls, parameter: PlannedParameter[Any], mesh: Mesh) -> Layout:
        """The layout of a parameter on a mesh."""
        sharding = NamedSharding(mesh, partition(parameter.spec(dict(mesh.shape))))
        indices = sharding.addressable_devices_indices_map(parameter.shape)
        bounds = {d: _bounds(index, parameter.shape) for d, index in indices.items()}
        return cls(parameter, sharding, bounds)


@runtime_checkable
class Placer(Protocol):
    """A way to bring a plan's bytes into device memory."""

    def place(
        self, plan: Plan[Piece], reader: Reader, mesh: Mesh, monitor: LoadMonitor
    ) -> dict[str, jax.Array]:
        """Loads every parameter of a plan, each device its own part only.

        Args:
            plan: What to load.
            reader: Where the files are.
            mesh: The device mesh, axes Auto.
            monitor: Told of the bytes of the stage `place`.

        Returns:
            The parameters by name, sharded as the plan says.

        Raises:
            ModelError: CHECKPOINT_CORRUPT; LOAD_CANCELLED.
        """
        ...

    def sink(self, layout: Layout) -> Sink:
        """One parameter to write, for bytes that no reader has as they are wanted."""
        ...


@runtime_checkable
class Sink(Protocol):
    """One parameter, while it is written box by box, from several threads."""

    def holds(self, start: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether a device of this process has some of a box."""
        ...

    def write(
        self, start: Sequence[int], shape: Sequence[int], values: np.ndarray, change: Change
    ) -> None:
        """Brings a box of the parameter to the devices that have some of it.

        Args:
            start: Where the box begins.
            shape: The shape of the box.
            values: What is stored of it; free again on return.
            change: Makes it the box, in the parameter's dtype, but for the shape.
        """
        ...

    def array(self) -> jax.Array:
        """The parameter, which must not be written any more."""
        ...


@dataclass(frozen=True)
class ArenaPlacer:
    """For CPU devices: files are read into memory that becomes the devices' without a copy.

    Attributes:
        arena: Where the memory comes from.
    """

    arena: Arena

    def place(
        self, plan: Plan[Piece], reader: Reader, mesh: Mesh, monitor: LoadMonitor
    ) -> dict[str, jax.Array]:
        """Allocates everything, then reads band by band in the order of the files."""
        layouts = [Layout.of(parameter, mesh) for parameter in plan.parameters]
        parts = [
            allocate(self.arena, layout.bounds.values(), layout.parameter.dtype)
            for layout in layouts
        ]
        jobs = [
            (band, own)
            for layout, own in zip(layouts, parts, strict=True)
            for band in bands(layout.parameter.pieces, own)
        ]
        jobs.sort(key=lambda job: (job[0].tensor.file, job[0].offset))

        with ThreadPoolExecutor(reader.threads, "place") as pool:
            for _ in pool.map(lambda job: fill(job[0], job[1], reader, monitor), jobs):
                pass
        return {
            layout.parameter.name: _alias(layout, own)
            for layout, own in zip(layouts, parts, strict=True)
        }

    def sink(self, layout: Layout) -> Sink:
        """One parameter in host memory."""
        own = allocate(self.arena, layout.bounds.values(), layout.parameter.dtype)
        return _ArenaSink(layout, own)


class _ArenaSink:
    def __init__(self, layout: Layout, parts: Parts) -> None:
        self._layout, self._parts = layout, parts

    def holds(self, start: Sequence[int], shape: Sequence[int]) -> bool:
        return any(overlap(bounds, start, shape) for bounds in self._parts)

    def write(
        self, start: Sequence[int], shape: Sequence[int], values: np.ndarray, change: Change
    ) -> None:
        box = change(values).reshape(shape)
        for bounds, part in self._parts.items():
            if found := overlap(bounds, start, shape):
                part[found[0]] = box[found[1]]

    def array(self) -> jax.Array:
        return _alias(self._layout, self._parts)


def _alias(layout: Layout, parts: Parts) -> jax.Array:
    """Makes the devices' array of host memory; it is read-only from here on."""
    for part in parts.values():
        part.flags.writeable = False
    shape = layout.parameter.shape

    def held(index: Index) -> np.ndarray:
        return parts[_bounds(index, shape)]

    return jax.make_array_from_callback(shape, layout.sharding, held)


def _bounds(index: Index, shape: Sequence[int]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))


def place(
    plan: Plan[Piece], reader: Reader, mesh: Mesh, monitor: LoadMonitor, placer: Placer
) -> dict[str, jax.Array]:
    """Loads every parameter of a plan, and checks what must be equal.

    Args:
        plan: What to load.
        reader: Where the files are.
        mesh: The device mesh, axes Auto.
        monitor: Told of the bytes of the stage `place`.
        placer: How they come into device memory.

    Returns:
        The parameters by name, sharded as the plan says.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if a file is shorter than its header stated;
            CHECKPOINT_MISMATCH if a stored tied head differs from the embedding; LOAD_CANCELLED.
    """
    pieces = [piece for parameter in plan.parameters for piece in parameter.pieces]
    compared = [(tensor, _first(plan, name)) for tensor, name in plan.duplicates]
    total = sum(piece.tensor.nbytes for piece in pieces)
    monitor.expect("place", total + 2 * sum(tensor.nbytes for tensor, _ in compared))
    params = placer.place(plan, reader, mesh, monitor)
    for pair in compared:
        _check_equal(*pair, reader, monitor)
    return params


def _first(plan: Plan[Piece], name: str) -> StoredTensor:
    return next(p for p in plan.parameters if p.name == name).pieces[0].tensor


def _check_equal(
    one: StoredTensor, other: StoredTensor, reader: Reader, monitor: LoadMonitor
) -> None:
    """Compares two stored tensors byte by byte, a read at a time."""
    equal = one.shape == other.shape and one.dtype == other.dtype
    for start in range(0, one.nbytes if equal else 0, READ_BYTES):
        size = min(READ_BYTES, one.nbytes - start)
        first = np.empty(size, np.uint8)
        reader.read(one.file, one.offset + start, first)
        second = reader.lend(other.file, other.offset + start, size)
        equal = equal and bool(np.array_equal(first, second))
        monitor.advance("place", 2 * size)
    if not equal:
        raise ModelError(
            Reason.CHECKPOINT_MISMATCH,
            f"the config ties the head to the embedding, but {one.name} differs from {other.name}",
        )
