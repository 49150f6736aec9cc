"""Compares copies of files with what a hub states of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import google_crc32c

from moorage_models.errors import ModelError, Reason
from moorage_models.regular_files import open_regular, unreadable
from moorage_models.sources.record import RemoteFile

_PIECE_BYTES = 8 << 20
_GIT = "git"  # SHA-1 over a header that has the size, and the bytes


@runtime_checkable
class Digest(Protocol):
    """A running digest, as hashlib's."""

    def update(self, data: bytes, /) -> None:
        """Takes more bytes."""
        ...

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        ...


class _Crc32c:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = google_crc32c.extend(self._value, data)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


#: The algorithms that hubs state digests in.
ALGORITHMS: Mapping[str, Callable[[], Digest]] = {
    "sha256": hashlib.sha256,
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "crc32c": _Crc32c,
    _GIT: lambda: hashlib.sha1(usedforsecurity=False),
}


def digest_of(path: Path, name: str, algorithm: str, progress: Callable[[int], None]) -> str:
    """The digest of a file, in hexadecimal.

    Args:
        path: The file.
        name: Its name, for the message.
        algorithm: One of `ALGORITHMS`.
        progress: Told of the bytes that were read; what it raises ends the reading.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if the file cannot be read.
    """
    digest = ALGORITHMS[algorithm]()
    try:
        with os.fdopen(open_regular(path, name), "rb") as content:
            if algorithm == _GIT:
                digest.update(b"blob %d\0" % os.fstat(content.fileno()).st_size)
            while piece := content.read(_PIECE_BYTES):
                digest.update(piece)
                progress(len(piece))
    except OSError as error:
        raise unreadable(name, error) from error
    return digest.hexdigest()


def verify(
    path: Path, name: str, file: RemoteFile, hub: str, progress: Callable[[int], None]
) -> RemoteFile:
    """Compares a copy, unless it was verified, with what the hub states; removes it if it differs.

    Args:
        path: The copy.
        name: Its name, for the message.
        file: What the hub states.
        hub: The hub, for the message.
        progress: Told of the bytes that were read.

    Returns:
        The file, verified.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if the size or the digest differs, or it cannot be read.
    """
    stat = os.stat(path)
    if (stat.st_size, stat.st_mtime_ns) == (file.size, file.verified_ns):
        return file
    algorithm, _, stated = file.digest.partition(":")
    found = ""
    if stated and stat.st_size == file.size:
        found = digest_of(path, name, algorithm, progress)
    if stat.st_size != file.size or found != stated:
        _remove(path)
        raise ModelError(
            Reason.CHECKPOINT_CORRUPT,
            f"{name} is not what {hub} states (size {file.size}, "
            f"{algorithm or 'digest'} {stated or 'unknown'}); it was removed: load again to fetch "
            "it again",
        )
    return RemoteFile(file.size, file.digest, stat.st_mtime_ns)


def _remove(path: Path) -> None:
    """Removes a file with all the links that lead to it: the hub's cache links its blobs."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)
