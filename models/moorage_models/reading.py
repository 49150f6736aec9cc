"""Reads runs of bytes of a checkpoint's files, as fast as the machine does."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from moorage_models.arena import Arena
from moorage_models.errors import ModelError, Reason
from moorage_models.regular_files import open_regular, opened_path

#: Bytes of one read; a multiple of the alignment.
READ_BYTES = 8 << 20

_ALIGNMENT = 4096  # of addresses, offsets and sizes that go past the page cache
_MAX_PIECES = 1024  # places that one call can fill (IOV_MAX of Linux)

# os.preadv takes an object a piece, at a cost near that of copying it.
_PREADV = ctypes.CDLL(None).preadv
_PREADV.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long]
_PREADV.restype = ctypes.c_ssize_t


class Arrivals:
    """The files of one load that are on this machine, while others are still being fetched."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._closed = False
        self._changed = threading.Condition()

    def add(self, name: str) -> None:
        """Says that a file is whole and verified."""
        with self._changed:
            self._names.add(name)
            self._changed.notify_all()

    def close(self) -> None:
        """Says that no more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, name: str) -> None:
        """Returns once a file is there.

        Raises:
            ModelError: LOAD_CANCELLED if it will not come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or name in self._names)
            if name not in self._names:
                raise ModelError(Reason.LOAD_CANCELLED, f"{name} was not fetched")


@runtime_checkable
class Reader(Protocol):
    """Where the bytes of a checkpoint's files come from.

    Attributes:
        threads: Reads that are worth doing at a time.
    """

    threads: int

    def read(self, name: str, offset: int, target: np.ndarray) -> None:
        """Fills an array with the bytes of a file from `offset` on.

        Args:
            name: The file.
            offset: Where in it.
            target: `uint8[n]`, contiguous.

        Raises:
            ModelError: CHECKPOINT_CORRUPT if the file ends before that or cannot be read.
        """
        ...

    def scatter(self, name: str, offset: int, groups: Sequence[Sequence[np.ndarray]]) -> None:
        """Fills arrays from one run of a file.

        Args:
            name: The file.
            offset: Where in it.
            groups: `uint8[rows, width]` each, whose rows are contiguous. Those of a group lie side
                by side in the file, row by row: the widths may differ. The groups follow one
                another; together they are at most `READ_BYTES`, or one row.

        Raises:
            ModelError: As `read`.
        """
        ...

    def lend(self, name: str, offset: int, nbytes: int) -> np.ndarray:
        """The bytes of a file from `offset` on, in memory that is the reader's.

        Args:
            name: The file.
            offset: Where in it.
            nbytes: How many; at most `READ_BYTES` go without a new allocation.

        Returns:
            `uint8[nbytes]`, until the next call from the same thread.

        Raises:
            ModelError: As `read`.
        """
        ...


class LocalFiles:
    """The files of a folder, open for one load.

    What the page cache holds is copied from it; the rest comes from the disk directly, at about
    twice the speed and without pushing anything out of the cache.
    """

    threads = 4

    def __init__(
        self,
        folder: Path,
        arrivals: Arrivals | None = None,
        roots: Sequence[Path] | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
            folder: The folder.
            arrivals: Which of the files are there; None if all are.
            roots: Directories under which they must really lie; None allows any.
        """
        self._folder = folder
        self._arrivals = arrivals
        self._roots = roots
        self._open: dict[str, _File] = {}
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._arena = Arena()

    def __enter__(self) -> LocalFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def read(self, name: str, offset: int, target: np.ndarray) -> None:
        """Fills an array with the bytes of a file from `offset` on."""
        for start in range(0, len(target), READ_BYTES):
            part = target[start : start + READ_BYTES]
            with self._file(name) as file:
                if file.is_cached(offset + start, len(part)):
                    file.read(offset + start, part)
                else:
                    part[:] = file.read_directly(offset + start, len(part), self._staging())

    def scatter(self, name: str, offset: int, groups: Sequence[Sequence[np.ndarray]]) -> None:
        """Fills arrays from one run of a file."""
        nbytes = sum(array.size for group in groups for array in group)
        with self._file(name) as file:
            cached = file.is_cached(offset, nbytes)
            if not (cached and file.scatter(offset, nbytes, groups)):
                spread(self._run(file, offset, nbytes, cached), groups)

    def lend(self, name: str, offset: int, nbytes: int) -> np.ndarray:
        """The bytes of a file from `offset` on, in memory that is the reader's."""
        with self._file(name) as file:
            return self._run(file, offset, nbytes, file.is_cached(offset, nbytes))

    def _run(self, file: _File, offset: int, nbytes: int, cached: bool) -> np.ndarray:
        if nbytes <= READ_BYTES and not cached:
            return file.read_directly(offset, nbytes, self._staging())
        run = self._staging()[:nbytes] if nbytes <= READ_BYTES else np.empty(nbytes, np.uint8)
        file.read(offset, run)
        return run

    def check_unchanged(self) -> None:
        """Refuses files that were written or replaced while they were read.

        Raises:
            ModelError: CHECKPOINT_CORRUPT.
        """
        for name, file in self._open.items():
            if not file.is_unchanged():
                raise _corrupt(f"{name} was changed while it was read: load again")

    @contextmanager
    def _file(self, name: str) -> Iterator[_File]:
        if self._arrivals and name not in self._open:
            self._arrivals.wait(name)
        try:
            with self._lock:
                if name not in self._open:
                    self._open[name] = _File(self._folder / name, name, self._roots)
            yield self._open[name]
        except OSError as error:
            raise _corrupt(f"{name} cannot be read: {error.strerror}") from error

    def _staging(self) -> np.ndarray:
        """A buffer of this thread that is aligned for reads past the page cache."""
        if not hasattr(self._thread, "staging"):
            # In huge pages: a disk is asked for less at a time where memory is scattered.
            self._thread.staging = self._arena.allocate(READ_BYTES + 2 * _ALIGNMENT)
        staging: np.ndarray = self._thread.staging
        return staging


def spread(run: np.ndarray, groups: Sequence[Sequence[np.ndarray]]) -> None:
    """Copies a run of bytes to the arrays that it is for, as `Reader.scatter` has them."""
    done = 0
    for group in groups:
        size = sum(array.size for array in group)
        rows = run[done : done + size].reshape(len(group[0]), -1)
        ends = itertools.accumulate(array.shape[1] for array in group)
        for array, end in zip(group, ends, strict=True):
            array[:] = rows[:, end - array.shape[1] : end]
        done += size


class _File:
    """One open file: through the page cache, and past it where the file system can."""

    def __init__(self, path: Path, name: str, roots: Sequence[Path] | None) -> None:
        self._path, self._name = path, name
        self._cached = open_regular(path, name, roots)
        self._direct: int | None = None
        with suppress(OSError):
            self._direct = os.open(opened_path(self._cached), os.O_RDONLY | os.O_DIRECT)
        # Else a look at one page would read what follows it.
        os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_RANDOM)
        self._identity = _identity(os.fstat(self._cached))

    def close(self) -> None:
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def is_unchanged(self) -> bool:
        try:
            return _identity(os.stat(self._path)) == self._identity
        except OSError:
            return False

    def is_cached(self, offset: int, nbytes: int) -> bool:
        """Whether the page cache holds a run, as its middle tells: a look may bring in its page.

        Where that cannot be known, or the cache cannot be passed, it is taken to.
        """
        if self._direct is None:
            return True
        try:
            os.preadv(self._cached, [bytearray(1)], offset + nbytes // 2, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def read(self, offset: int, target: np.ndarray) -> None:
        view, done = target.data, 0
        while done < len(view):
            count = os.preadv(self._cached, [view[done:]], offset + done)
            if count == 0:
                raise _corrupt(f"{self._name} ends before its tensors do")
            done += count

    def scatter(self, offset: int, nbytes: int, groups: Sequence[Sequence[np.ndarray]]) -> bool:
        """Copies a run from the page cache to its places; false if it ended early."""
        pieces = np.concatenate([_addresses(group) for group in groups])
        done = 0
        for start in range(0, len(pieces), _MAX_PIECES):
            some = pieces[start : start + _MAX_PIECES]
            done += _PREADV(self._cached, some.ctypes.data, len(some), offset + done)
        return bool(done == nbytes)

    def read_directly(self, offset: int, nbytes: int, staging: np.ndarray) -> np.ndarray:
        """Reads the aligned run around the bytes that are wanted, past the page cache."""
        skipped = offset % _ALIGNMENT
        run = staging[: -(-(skipped + nbytes) // _ALIGNMENT) * _ALIGNMENT]
        assert self._direct is not None
        try:
            count = os.preadv(self._direct, [run.data], offset - skipped)
        except OSError:  # some file systems only say so now
            count = 0
        done = max(0, min(count - skipped, nbytes))
        wanted = run[skipped : skipped + nbytes]
        if done < nbytes:
            self.read(offset + done, wanted[done:])
        return wanted


def _addresses(group: Sequence[np.ndarray]) -> np.ndarray:
    """Where the rows of a group lie in memory, and how long they are: `uint64[pieces, 2]`."""
    pieces = np.empty((len(group[0]), len(group), 2), np.uint64)
    for i, array in enumerate(group):
        addresses = array.ctypes.data + array.strides[0] * np.arange(len(array))
        pieces[:, i, 0], pieces[:, i, 1] = addresses, array.shape[1]
    return pieces.reshape(-1, 2)


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _corrupt(message: str) -> ModelError:
    return ModelError(Reason.CHECKPOINT_CORRUPT, message)
