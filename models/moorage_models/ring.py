"""For accelerators: files go through a few host buffers into arrays on the devices."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from moorage_models.arena import Arena
from moorage_models.bands import Bounds, allocate, bands, boxes, fill, holds, overlap
from moorage_models.dtypes import numpy_dtype
from moorage_models.monitor import LoadMonitor
from moorage_models.placement import Change, Layout, Sink
from moorage_models.plan import Piece, Plan
from moorage_models.reading import READ_BYTES, Reader

#: Host memory beyond the model that a load may take.
WINDOW_BYTES = 256 << 20

_BUFFERS = 4


@dataclass(frozen=True)
class _Chunk:
    """The same part of every device's shard of one parameter.

    Attributes:
        layout: How the parameter lies on the devices.
        start: Where in a shard it begins.
        shape: Its shape on one device.
        bounds: The part of the parameter that each device of this process gets.
        pieces: The stored tensors that hold some of that.
    """

    layout: Layout
    start: tuple[int, ...]
    shape: tuple[int, ...]
    bounds: dict[Any, Bounds]
    pieces: tuple[Piece, ...]

    @property
    def last_file(self) -> str:
        """The file that completes it, where files arrive in order."""
        return max(piece.tensor.file for piece in self.pieces)


@dataclass(frozen=True)
class RingPlacer:
    """Fills arrays on the devices chunk by chunk, in place.

    All processes of a mesh make the same updates in the same order, each with its own bytes.

    Attributes:
        window: Bytes of host memory that may be in use at a time.
    """

    window: int = WINDOW_BYTES

    def place(
        self, plan: Plan[Piece], reader: Reader, mesh: Mesh, monitor: LoadMonitor
    ) -> dict[str, jax.Array]:
        """Allocates everything on the devices, then reads ahead by as much as the ring holds."""
        layouts = [Layout.of(parameter, mesh) for parameter in plan.parameters]
        params = {layout.parameter.name: _zeros(layout) for layout in layouts}
        limit = (self.window - reader.threads * READ_BYTES) // (_BUFFERS + 1)
        chunks = [chunk for layout in layouts for chunk in _chunks(layout, limit)]
        chunks.sort(key=lambda chunk: chunk.last_file)
        arena, ahead, tokens = Arena(self.window), deque[_Filling](), deque[jax.Array]()

        def put_oldest() -> None:
            filling = ahead.popleft()
            name = filling.chunk.layout.parameter.name
            params[name], token = filling.put(params[name])
            tokens.append(token)

        with ThreadPoolExecutor(reader.threads, "place") as pool:
            for chunk in chunks:
                if len(ahead) == _BUFFERS // 2:
                    put_oldest()
                if len(ahead) + len(tokens) == _BUFFERS:
                    tokens.popleft().block_until_ready()
                ahead.append(_Filling(chunk, arena, reader, monitor, pool))
            while ahead:
                put_oldest()
        return params

    def sink(self, layout: Layout) -> Sink:
        """One parameter on the devices."""
        return _RingSink(layout)


class _RingSink:
    """A parameter whose shards are updated one by one, each on its own device."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._shards = {shard.device: shard.data for shard in _zeros(layout).addressable_shards}
        self._lock = threading.Lock()

    def holds(self, start: Sequence[int], shape: Sequence[int]) -> bool:
        return any(overlap(bounds, start, shape) for bounds in self._layout.bounds.values())

    def write(
        self, start: Sequence[int], shape: Sequence[int], values: np.ndarray, change: Change
    ) -> None:
        """The change is made on one device, from which the others get their parts."""
        box = _changed(jax.device_put(values, next(iter(self._shards))), change, tuple(shape))
        tokens = []
        for device, bounds in self._layout.bounds.items():
            if found := overlap(bounds, start, shape):
                into, of = (np.array([part.start for part in place], np.int32) for place in found)
                size = tuple(part.stop - part.start for part in found[1])
                part = jax.device_put(_part_of(box, of, size), device)
                with self._lock:
                    self._shards[device], token = _write_shard(self._shards[device], part, into)
                tokens.append(token)
        jax.block_until_ready(tokens)

    def array(self) -> jax.Array:
        shape, sharding = self._layout.parameter.shape, self._layout.sharding
        shards = list(self._shards.values())
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


class _Filling:
    """A chunk that is being read into host memory."""

    def __init__(
        self,
        chunk: _Chunk,
        arena: Arena,
        reader: Reader,
        monitor: LoadMonitor,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.chunk = chunk
        self._parts = allocate(arena, chunk.bounds.values(), chunk.layout.parameter.dtype)
        self._reads = [
            pool.submit(fill, band, self._parts, reader, monitor)
            for band in bands(chunk.pieces, self._parts)
        ]

    def put(self, stack: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Waits for the reads, and writes the chunk into its parameter.

        Args:
            stack: The parameter; gone afterwards.

        Returns:
            The parameter, and an array that is ready once the host memory is free again.
        """
        _wait(self._reads)
        chunk, sharding = self.chunk, self.chunk.layout.sharding
        ways = zip(stack.shape, sharding.shard_shape(stack.shape), chunk.shape, strict=True)
        shape = tuple(whole // shard * size for whole, shard, size in ways)
        arrays = [jax.device_put(self._parts[part], d) for d, part in chunk.bounds.items()]
        update = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
        self._parts.clear()
        start = np.array(chunk.start, np.int32)
        written: tuple[jax.Array, jax.Array] = _write(stack, update, start, sharding)
        return written


def _wait(reads: list[Future[None]]) -> None:
    """Raises what the first of the reads raised, and cancels the others."""
    wait(reads, return_when=FIRST_EXCEPTION)
    for read in reads:
        if read.done() and read.exception():
            for other in reads:
                other.cancel()
            read.result()


def _chunks(layout: Layout, limit: int) -> Iterator[_Chunk]:
    """Cuts a parameter into parts that take at most `limit` bytes on this host, if a row does."""
    parameter = layout.parameter
    shape = layout.sharding.shard_shape(parameter.shape)
    distinct = len(set(layout.bounds.values()))
    item_bytes = distinct * numpy_dtype(parameter.dtype).itemsize
    pieces: dict[tuple[int, ...], list[Piece]] = {}
    for piece in parameter.pieces:
        pieces.setdefault(piece.index[:1], []).append(piece)
    for start, part in boxes(shape, limit // item_bytes):
        bounds = {device: _part(b, start, part) for device, b in layout.bounds.items()}
        layers = range(start[0], start[0] + part[0])
        near = [p for layer in layers for p in pieces.get((layer,), ())] or parameter.pieces
        held = [p for p in near if any(holds(b, p.index) for b in set(bounds.values()))]
        yield _Chunk(layout, start, part, bounds, tuple(held))


def _part(shard: Bounds, start: Sequence[int], shape: Sequence[int]) -> Bounds:
    return tuple(
        (first + begin, first + begin + size)
        for (first, _), begin, size in zip(shard, start, shape, strict=True)
    )


def _zeros(layout: Layout) -> jax.Array:
    parameter = layout.parameter
    array: jax.Array = _filled(parameter.shape, numpy_dtype(parameter.dtype), layout.sharding)
    return array


@partial(jax.jit, static_argnums=(0, 1, 2))
def _filled(shape: tuple[int, ...], dtype: np.dtype[Any], sharding: NamedSharding) -> Array:
    """Zeros; the next load of such a parameter finds the program."""
    zeros: Array = jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)
    return zeros


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(
    stack: Array, update: Array, start: Int32[Array, " axes"], sharding: NamedSharding
) -> tuple[Array, Array]:
    """Writes each device's part of an update into its shard, without any communication."""
    specs = (sharding.spec, sharding.spec, PartitionSpec())
    local = jax.shard_map(_updated, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)
    written: Array = local(stack, update, start)
    return written, start[0] + 1


@partial(jax.jit, donate_argnums=0)
def _write_shard(shard: Array, part: Array, start: Int32[Array, " axes"]) -> tuple[Array, Array]:
    """As `_write`, of one device."""
    return _updated(shard, part, start), start[0] + 1


@partial(jax.jit, static_argnums=(1, 2))
def _changed(values: Array, change: Change, shape: tuple[int, ...]) -> Array:
    changed: Array = change(values).reshape(shape)
    return changed


@partial(jax.jit, static_argnums=2)
def _part_of(values: Array, start: Int32[Array, " axes"], shape: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_slice(values, tuple(start), shape)


def _updated(shard: Array, part: Array, start: Int32[Array, " axes"]) -> Array:
    # As integers: XLA on CPU would take all of a bfloat16 shard to float32 and back.
    bits = jnp.dtype(f"uint{8 * shard.dtype.itemsize}")
    whole, part = (jax.lax.bitcast_convert_type(x, bits) for x in (shard, part))
    whole = jax.lax.dynamic_update_slice(whole, part, tuple(start))
    return jax.lax.bitcast_convert_type(whole, shard.dtype)
