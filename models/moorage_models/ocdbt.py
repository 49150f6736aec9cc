"""Bounds what tensorstore will take into memory to read an OCDBT database.

tensorstore decodes the manifest and the nodes of the tree as a whole, whatever they become. So
those that lead to the latest version are looked at before. The format is that of tensorstore's
documentation of its `ocdbt` driver.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from moorage_models.regular_files import read_range
from moorage_models.sources.source import within

MANIFEST = "manifest.ocdbt"

_MANIFEST_MAGIC, _NODE_MAGIC = b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde"
_HEADER_BYTES, _CHECKSUM_BYTES = 14, 4
_MAX_NODE_BYTES = 16 << 20  # decoded or not; tensorstore writes nodes of half of that
_MAX_BYTES = 256 << 20  # of all nodes


@dataclass(frozen=True)
class _Place:
    """Where a node lies: a range of a file, and what the names in it are relative to."""

    file: str
    offset: int
    nbytes: int
    base: str


def require_bounded(folder: Path) -> None:
    """Refuses a database of which a part that is decoded as a whole is too long.

    Args:
        folder: The folder that holds the manifest.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if a file cannot be read.
        ValueError: Something is too long, or not as the format has it.
    """
    whole = read_range(folder / MANIFEST, MANIFEST, 0, _MAX_NODE_BYTES + 1)
    pending, seen, total = [_root(_Fields(_decoded(whole, _MANIFEST_MAGIC)))], set[_Place](), 0
    while pending:
        place = pending.pop()
        if place is None or place in seen:
            continue
        if place.nbytes > _MAX_NODE_BYTES or not within(place.file):
            raise ValueError("a node that is too long, or is elsewhere")
        stop = place.offset + place.nbytes
        encoded = read_range(folder / place.file, place.file, place.offset, stop)
        node = _decoded(encoded, _NODE_MAGIC)
        total += len(node)
        if total > _MAX_BYTES:
            raise ValueError("too many nodes")
        seen.add(place)
        pending += _children(_Fields(node), place.base)


def _decoded(encoded: bytes, magic: bytes) -> bytes:
    """What a manifest or a node holds, without its header and checksum."""
    length, compression = int.from_bytes(encoded[4:12], "little"), encoded[12:_HEADER_BYTES]
    if encoded[:4] != magic or length != len(encoded) or compression not in (b"\0\0", b"\0\1"):
        raise ValueError("no manifest or node, or one that is cut short")
    body = encoded[_HEADER_BYTES:-_CHECKSUM_BYTES]
    if compression == b"\0\1":
        body = zstandard.ZstdDecompressor().stream_reader(body).read(_MAX_NODE_BYTES + 1)
    if len(body) > _MAX_NODE_BYTES:
        raise ValueError("a node is too long")
    return body


class _Fields:
    """Reads fields one after another."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def take(self, count: int) -> bytes:
        part = self._content.read(count)
        if len(part) != count:
            raise ValueError("a node is cut short")
        return part

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        value, shift = 0, 0
        while shift < 64:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("a number is too long")

    def numbers(self, count: int) -> list[int]:
        return [self.number() for _ in range(count)]

    def places(
        self, count: int, files: list[tuple[str, str]], base: str
    ) -> Iterator[_Place | None]:
        """Places of nodes; None for no node at all."""
        which, offsets, sizes = (self.numbers(count) for _ in range(3))
        for file, offset, nbytes in zip(which, offsets, sizes, strict=True):
            path, transitive = files[file]
            is_missing = offset == nbytes == (1 << 64) - 1
            yield None if is_missing else _Place(base + path, offset, nbytes, base + transitive)

    def files(self) -> list[tuple[str, str]]:
        """The files that are referred to, and what is passed on of their paths."""
        count = self.number()
        kept = [0, *self.numbers(max(count - 1, 0))]
        added, transitive = self.numbers(count), self.numbers(count)
        found, path = [], ""
        for keep, add, base in zip(kept, added, transitive, strict=False):
            path = path[:keep] + self.take(add).decode()
            found.append((path, path[:base]))
        return found


def _root(manifest: _Fields) -> _Place | None:
    """The root of the latest version."""
    manifest.take(16)  # the database's identifier
    if manifest.number() != 0:
        raise ValueError("the versions are in other manifests")
    manifest.numbers(2)
    manifest.byte()
    if manifest.number() != 0:
        manifest.take(4)  # the level of compression
    files, count = manifest.files(), manifest.number()
    manifest.numbers(count)
    manifest.take(count)
    return list(manifest.places(count, files, ""))[-1]


def _children(node: _Fields, base: str) -> Iterator[_Place | None]:
    """The nodes below one; none below a leaf, the rest of which is not looked at."""
    if node.byte() == 0:
        return
    files, count = node.files(), node.number()
    node.numbers(max(count - 1, 0))
    added = node.numbers(count)
    node.numbers(count)
    node.take(sum(added))
    yield from node.places(count, files, base)
