"""The arrays of an Orbax checkpoint, in slabs of a few megabytes.

Orbax often stores an array as one chunk, and tensorstore decodes a chunk as a whole, in twice its
size of host memory. So what Orbax writes (zarr v2 and v3, zstd or nothing) is decoded here as it
comes; tensorstore brings the bytes, and reads what is encoded otherwise, a chunk at a time. It
decodes no more than a chunk is to hold, but for blosc, whose header is looked at before.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import google_crc32c
import numpy as np
import tensorstore as ts
import zstandard

from moorage_models.arena import Arena
from moorage_models.bands import boxes
from moorage_models.dtypes import ITEM_BYTES, numpy_dtype
from moorage_models.errors import ModelError, Reason
from moorage_models.layouts import StoredArray
from moorage_models.regular_files import read_range
from moorage_models.zarr_encodings import Encoding, encoding_of

#: Bytes of a slab, and of what is read of an encoded chunk at a time.
SLAB_BYTES = 8 << 20
_ENCODED_BYTES = 4 << 20

_MAX_METADATA_BYTES = 32 << 20  # of a tree
_MAX_ARRAY_BYTES = 1 << 20  # of the metadata of an array
_BLOSC_HEADER_BYTES = 16
_MISSING = (1 << 64) - 1  # of zarr's sharding codec

#: The metadata of an array, by tensorstore's driver.
_METADATA_KEYS = {"zarr": ".zarray", "zarr3": "zarr.json"}

#: Where a slab begins in its array, and what it holds.
Slab = tuple[tuple[int, ...], np.ndarray]


class ChunkedTree:
    """The arrays of an Orbax checkpoint on this machine."""

    def __init__(self, folder: Path) -> None:
        self._driver = "zarr3" if _says_zarr3(folder / "_METADATA") else "zarr"
        self._ocdbt = (folder / "manifest.ocdbt").exists()
        self._folder = folder.absolute()
        self._whole = threading.Lock()
        self._context = ts.Context()

    def describe(self, paths: Iterable[tuple[str, ...]]) -> list[StoredArray]:
        """What is stored under some paths.

        Raises:
            ModelError: CHECKPOINT_CORRUPT.
        """
        stores = [(path, self._open(path)[0]) for path in paths]
        return [StoredArray(path, s.dtype.name, tuple(map(int, s.shape))) for path, s in stores]

    def open(self, tensor: StoredArray, whole_axes: Collection[int]) -> ChunkedArray:
        """Opens an array.

        Args:
            tensor: Which one.
            whole_axes: The axes that no chunk may cut.

        Raises:
            ModelError: CHECKPOINT_CORRUPT; CHECKPOINT_UNSUPPORTED for an encoding that no writer of
                checkpoints uses.
        """
        store, values = self._open(tensor.path)
        with _corrupt(tensor.path):
            if (store.dtype.name, tuple(store.shape)) != (tensor.dtype, tensor.shape):
                raise ValueError("the array was changed")
            encoding = encoding_of(self._driver, store.spec().to_json()["metadata"])
            encoding.require_fit(tensor.shape, ITEM_BYTES[tensor.dtype])
            return ChunkedArray(tensor, store, values, encoding, whole_axes, self._whole)

    def _open(self, path: tuple[str, ...]) -> tuple[ts.TensorStore, ts.KvStore]:
        name = ".".join(path)
        # As a spec: in a URL, `%` and `|` in a folder's name would lead elsewhere.
        spec: dict[str, Any] = {"driver": "file", "path": f"{self._folder}/{name}/"}
        if self._ocdbt:
            base = {"driver": "file", "path": f"{self._folder}/"}
            spec = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        with _corrupt(path):
            values = ts.KvStore.open(spec, context=self._context).result()
            _require_short(values, _METADATA_KEYS[self._driver])
            array = {"driver": self._driver, "kvstore": spec}
            return ts.open(array, open=True, context=self._context).result(), values


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
        encoding: Encoding,
        whole_axes: Collection[int],
        whole: threading.Lock,
    ) -> None:
        self._chunk = tuple(
            size if axis in whole_axes else min(chunk, size)
            for axis, (chunk, size) in enumerate(zip(encoding.inner, tensor.shape, strict=True))
        )
        uncut = all(encoding.inner[axis] >= tensor.shape[axis] for axis in whole_axes)
        self.tensor = tensor
        self._store, self._values, self._whole = store, values, whole
        self._stored = encoding
        self._encoding = encoding if encoding.plain and uncut else None
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
        with _corrupt(self.tensor.path):
            stream = self._stream(start) if self._encoding else None
            if self._encoding is None or stream is None:  # or not stored, as zeros may be
                yield from self._read_whole(start, check)
                return
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
        """A chunk's decoded bytes; None if it is not stored."""
        value = self._value(start)
        if value is None or not self._stored.codec:
            return value
        return zstandard.ZstdDecompressor().stream_reader(
            cast(IO[bytes], value), read_size=_ENCODED_BYTES, read_across_frames=True
        )

    def _value(self, start: Sequence[int]) -> _Value | None:
        encoding = self._stored
        key = encoding.key([s // outer for s, outer in zip(start, encoding.outer, strict=True)])
        if self._values.read(key, byte_range=slice(0, 0)).result().state == "missing":
            return None
        if not encoding.index:
            return _Value(self._values, key)
        first, nbytes = self._entry(encoding, key, start)
        if first == _MISSING:
            return None
        return _Value(self._values, key, first, first + nbytes)

    def _entry(self, encoding: Encoding, key: str, start: Sequence[int]) -> tuple[int, int]:
        """Where in a value an inner chunk lies: an offset and a number of bytes."""
        pairs = zip(encoding.outer, encoding.inner, strict=True)
        grid = [outer // inner for outer, inner in pairs]
        nbytes = 16 * math.prod(grid)
        place = slice(0, nbytes + 4) if encoding.index == "start" else slice(-nbytes - 4, None)
        read = self._values.read(key, byte_range=place)
        index, checksum = read.result().value[:nbytes], read.result().value[nbytes:]
        if int.from_bytes(checksum, "little") != google_crc32c.value(index):
            raise ValueError("the index of a chunk is damaged")
        inside = zip(start, encoding.outer, encoding.inner, strict=True)
        at = tuple(s % outer // inner for s, outer, inner in inside)
        first, size = np.frombuffer(index, "<u8").reshape(*grid, 2)[at]
        return int(first), int(size)

    def _read_whole(self, start: Sequence[int], check: Callable[[], None]) -> Iterator[Slab]:
        kind = numpy_dtype(self.tensor.dtype)
        ends = zip(start, self._chunk, self.tensor.shape, strict=True)
        box = tuple(slice(s, min(s + step, size)) for s, step, size in ends)
        if self._stored.codec == "blosc":
            self._require_sizes(box)
        with self._whole:
            read = self._store[box].read()
            chunk = _wait(read, check).view(kind)
            for offset, shape in boxes(chunk.shape, SLAB_BYTES // kind.itemsize):
                check()
                begin = tuple(map(sum, zip(start, offset, strict=True)))
                part = tuple(slice(o, o + size) for o, size in zip(offset, shape, strict=True))
                yield begin, chunk[part]

    def _require_sizes(self, box: Sequence[slice]) -> None:
        """Refuses chunks whose headers tell of more, or less, than they are to hold.

        A header of blosc's says how much memory the chunk takes, up to 4 GiB.
        """
        wanted = math.prod(self._stored.inner) * numpy_dtype(self.tensor.dtype).itemsize
        grid = zip(box, self._stored.inner, strict=True)
        for start in itertools.product(*(range(b.start, b.stop, step) for b, step in grid)):
            value = self._value(start)
            header = value.read(_BLOSC_HEADER_BYTES) if value else b""
            if value and int.from_bytes(header[4:8], "little") != wanted:
                raise ValueError("a chunk's size is not that of its shape")


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


def _require_short(values: ts.KvStore, key: str) -> None:
    """Refuses metadata that tensorstore would take much memory for."""
    byte = slice(_MAX_ARRAY_BYTES, _MAX_ARRAY_BYTES + 1)
    try:
        found = values.read(key, byte_range=byte).result().state
    except ValueError:  # it ends before that
        return
    if found != "missing":
        raise ValueError(f"{key} has more than {_MAX_ARRAY_BYTES} bytes")


def _says_zarr3(path: Path) -> bool:
    try:
        said = json.loads(read_range(path, path.name, 0, _MAX_METADATA_BYTES))
        return bool(said.get("use_zarr3"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(Reason.CHECKPOINT_CORRUPT, f"{path.name} is damaged") from error


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


#: What tensorstore and the decoders raise; most of tensorstore's are ValueErrors.
_DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    OSError,
    zstandard.ZstdError,
)


@contextmanager
def _corrupt(path: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise ModelError(
            Reason.CHECKPOINT_CORRUPT, f"array {'/'.join(path)} cannot be read"
        ) from error
