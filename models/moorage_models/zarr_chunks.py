"""The arrays of an Orbax checkpoint, in slabs of a few megabytes.

Orbax often stores an array as one chunk, and tensorstore decodes a chunk as a whole, in twice its
size of host memory. So what Orbax writes (zarr v2 and v3, zstd or nothing) is decoded here as it
comes; tensorstore brings the bytes, and reads what is encoded otherwise, a chunk at a time.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import google_crc32c
import numpy as np
import tensorstore as ts
import zstandard

from moorage_models.arena import Arena
from moorage_models.bands import boxes
from moorage_models.dtypes import numpy_dtype
from moorage_models.errors import ModelError, Reason
from moorage_models.layouts import StoredArray

#: Bytes of a slab, and of what is read of an encoded chunk at a time.
SLAB_BYTES = 8 << 20
_ENCODED_BYTES = 4 << 20

_MISSING = (1 << 64) - 1  # of zarr's sharding codec

#: Where a slab begins in its array, and what it holds.
Slab = tuple[tuple[int, ...], np.ndarray]


@dataclass(frozen=True)
class _Encoding:
    """How the chunks of an array are kept.

    Attributes:
        outer: The shape of what lies under one key.
        inner: The shape of what is encoded as one; less than `outer` if there is an index.
        compressed: By zstd, or not.
        key: The key of an outer chunk, from its place in their grid.
        indexed: An index of the inner chunks ends the value.
    """

    outer: tuple[int, ...]
    inner: tuple[int, ...]
    compressed: bool
    key: Callable[[Sequence[int]], str]
    indexed: bool = False


def _zarr2(metadata: Mapping[str, Any]) -> _Encoding | None:
    """Zarr storage specification version 2."""
    shape, compressor = tuple(metadata["chunks"]), metadata["compressor"] or {"id": ""}
    separator = metadata.get("dimension_separator", ".")
    plain = metadata["order"] == "C" and not metadata["filters"]
    if not plain or compressor["id"] not in ("", "zstd") or metadata["dtype"].startswith(">"):
        return None
    return _Encoding(shape, shape, bool(compressor["id"]), lambda at: separator.join(map(str, at)))


def _zarr3(metadata: Mapping[str, Any]) -> _Encoding | None:
    """Zarr core specification version 3, and its sharding codec, of which Orbax makes use."""
    outer = inner = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    codecs, indexed = metadata["codecs"], False
    if codecs[0]["name"] == "sharding_indexed":
        sharding = codecs[0]["configuration"]
        inner, codecs, indexed = tuple(sharding["chunk_shape"]), sharding["codecs"], True
        ends = sharding.get("index_location", "end") == "end"
        if not ends or [c["name"] for c in sharding["index_codecs"]] != ["bytes", "crc32c"]:
            return None
    names = [codec["name"] for codec in codecs]
    endian = codecs[0].get("configuration", {}).get("endian", "little")
    plain = metadata["chunk_key_encoding"]["name"] == "default" and endian == "little"
    if not plain or names not in (["bytes"], ["bytes", "zstd"]):
        return None
    separator = metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
    key = lambda at: separator.join(["c", *map(str, at)])  # noqa: E731
    return _Encoding(outer, inner, len(names) > 1, key, indexed)


_ENCODINGS: Mapping[str, Callable[[Mapping[str, Any]], _Encoding | None]] = {
    "zarr": _zarr2,
    "zarr3": _zarr3,
}


class ChunkedTree:
    """The arrays of an Orbax checkpoint on this machine."""

    def __init__(self, folder: Path) -> None:
        said = json.loads((folder / "_METADATA").read_text())
        self._driver = "zarr3" if said.get("use_zarr3") else "zarr"
        self._ocdbt = (folder / "manifest.ocdbt").exists()
        self._folder = folder.absolute()
        self._whole = threading.Lock()

    def open(self, tensor: StoredArray, whole_axes: Collection[int]) -> ChunkedArray:
        """Opens an array.

        Args:
            tensor: Which one.
            whole_axes: The axes that no chunk may cut.

        Raises:
            ModelError: CHECKPOINT_CORRUPT.
        """
        name = ".".join(tensor.path)
        spec: dict[str, Any] = {"driver": "file", "path": f"{self._folder}/{name}/"}
        if self._ocdbt:
            spec = {"driver": "ocdbt", "base": f"file://{self._folder}", "path": f"{name}/"}
        with _corrupt(tensor):
            store = ts.open({"driver": self._driver, "kvstore": spec}, open=True).result()
            values = ts.KvStore.open(spec).result()
        encoding = _ENCODINGS[self._driver](store.spec().to_json()["metadata"])
        return ChunkedArray(tensor, store, values, encoding, whole_axes, self._whole)


class ChunkedArray:
    """One array of an Orbax checkpoint.

    Attributes:
        tensor: Which one.
        starts: Where its chunks begin.
    """

    def __init__(
        self,
        tensor: StoredArray,
        store: ts.TensorStore,
        values: ts.KvStore,
        encoding: _Encoding | None,
        whole_axes: Collection[int],
        whole: threading.Lock,
    ) -> None:
        stored = store.chunk_layout.read_chunk.shape or ()
        shape = encoding.inner if encoding else tuple(size or 1 for size in stored)
        self._chunk = tuple(
            size if axis in whole_axes else min(chunk, size)
            for axis, (chunk, size) in enumerate(zip(shape, tensor.shape, strict=True))
        )
        decodable = all(shape[axis] >= tensor.shape[axis] for axis in whole_axes)
        self.tensor = tensor
        self._store, self._values, self._whole = store, values, whole
        self._encoding = encoding if decodable else None
        grid = zip(tensor.shape, self._chunk, strict=True)
        self.starts = list(itertools.product(*(range(0, size, step) for size, step in grid)))

    def slabs(
        self, start: tuple[int, ...], arena: Arena, check: Callable[[], None]
    ) -> Iterator[Slab]:
        """What a chunk holds of the array, in the order of the stored axes.

        Args:
            start: Where the chunk begins.
            arena: Where the slabs' memory comes from.
            check: Called while something takes long; may raise.

        Raises:
            ModelError: CHECKPOINT_CORRUPT.
        """
        with _corrupt(self.tensor):
            stream = self._stream(start)
            if stream is None:
                yield from self._read_whole(start, check)
                return
            assert self._encoding is not None
            kind = numpy_dtype(self.tensor.dtype)
            for offset, shape in boxes(self._encoding.inner, SLAB_BYTES // kind.itemsize):
                check()
                slab = arena.allocate(math.prod(shape) * kind.itemsize)
                _fill(stream, slab)
                begin = tuple(map(sum, zip(start, offset, strict=True)))
                ends = (slice(max(0, s - b)) for s, b in zip(self.tensor.shape, begin, strict=True))
                yield begin, slab.view(kind).reshape(shape)[tuple(ends)]
            if stream.read(1):
                raise ValueError("a chunk is longer than its shape")

    def _stream(self, start: Sequence[int]) -> _Value | zstandard.ZstdDecompressionReader | None:
        """A chunk's bytes; None if tensorstore has to read it: encoded otherwise, or not stored."""
        encoding = self._encoding
        if encoding is None:
            return None
        key = encoding.key([s // outer for s, outer in zip(start, encoding.outer, strict=True)])
        if self._values.read(key, byte_range=slice(0, 0)).result().state == "missing":
            return None
        value = _Value(self._values, key)
        if encoding.indexed:
            first, nbytes = self._entry(encoding, key, start)
            if first == _MISSING:
                return None
            value = _Value(self._values, key, first, first + nbytes)
        if not encoding.compressed:
            return value
        return zstandard.ZstdDecompressor().stream_reader(
            cast(IO[bytes], value), read_size=_ENCODED_BYTES, read_across_frames=True
        )

    def _entry(self, encoding: _Encoding, key: str, start: Sequence[int]) -> tuple[int, int]:
        """Where in a value an inner chunk lies: an offset and a number of bytes."""
        pairs = zip(encoding.outer, encoding.inner, strict=True)
        grid = [outer // inner for outer, inner in pairs]
        nbytes = 16 * math.prod(grid)
        read = self._values.read(key, byte_range=slice(-nbytes - 4, None))
        index, checksum = read.result().value[:nbytes], read.result().value[nbytes:]
        if int.from_bytes(checksum, "little") != google_crc32c.value(index):
            raise ValueError("the index of a chunk is damaged")
        inside = zip(start, encoding.outer, encoding.inner, strict=True)
        place = tuple(s % outer // inner for s, outer, inner in inside)
        first, size = np.frombuffer(index, "<u8").reshape(*grid, 2)[place]
        return int(first), int(size)

    def _read_whole(self, start: Sequence[int], check: Callable[[], None]) -> Iterator[Slab]:
        kind = numpy_dtype(self.tensor.dtype)
        ends = zip(start, self._chunk, self.tensor.shape, strict=True)
        box = tuple(slice(s, min(s + step, size)) for s, step, size in ends)
        with self._whole:
            read = self._store[box].read()
            chunk = _wait(read, check).view(kind)
            for offset, shape in boxes(chunk.shape, SLAB_BYTES // kind.itemsize):
                check()
                begin = tuple(map(sum, zip(start, offset, strict=True)))
                part = tuple(slice(o, o + size) for o, size in zip(offset, shape, strict=True))
                yield begin, chunk[part]


class _Value:
    """A value of a key-value store, or a part of one, as a file that is read once."""

    def __init__(
        self, values: ts.KvStore, key: str, first: int = 0, stop: int | None = None
    ) -> None:
        self._values, self._key, self._next, self._stop = values, key, first, stop

    def read(self, count: int) -> bytes:
        last = self._next + count if self._stop is None else min(self._next + count, self._stop)
        part = self._part(last) if last > self._next else b""
        self._next += len(part)
        return part

    def readinto(self, target: memoryview) -> int:
        part = self.read(min(len(target), _ENCODED_BYTES))
        target[: len(part)] = part
        return len(part)

    def _part(self, last: int) -> bytes:
        try:
            part = self._values.read(self._key, byte_range=slice(self._next, last))
            return bytes(part.result().value)
        except ValueError:  # it ends before `last`, which cannot be known
            part = self._values.read(self._key, byte_range=slice(self._next, None))
            return bytes(part.result().value)


def _wait(read: ts.Future[np.ndarray], check: Callable[[], None]) -> np.ndarray:
    while True:
        check()
        with suppress(TimeoutError):
            return np.asarray(read.result(timeout=0.2))


def _fill(stream: _Value | zstandard.ZstdDecompressionReader, target: np.ndarray) -> None:
    view, done = memoryview(target), 0  # type: ignore[arg-type]
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise ValueError("a chunk is shorter than its shape")
        done += count


@contextmanager
def _corrupt(tensor: StoredArray) -> Iterator[None]:
    try:
        yield
    except (ValueError, zstandard.ZstdError) as error:  # tensorstore's are ValueErrors
        raise ModelError(
            Reason.CHECKPOINT_CORRUPT, f"array {'/'.join(tensor.path)} cannot be read"
        ) from error
