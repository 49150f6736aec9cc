"""What this machine holds of one revision of a checkpoint, and what of it was verified."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from moorage_models.errors import ModelError
from moorage_models.regular_files import read_range
from moorage_models.sources.source import within

_MAX_NAME_BYTES = 1 << 10  # of a revision
_MAX_BYTES = 32 << 20  # of the list of its files


@dataclass(frozen=True)
class RemoteFile:
    """A file of one revision.

    Attributes:
        size: Its bytes.
        digest: What the hub states of its content, as `algorithm:hexadecimal`; see `digests`.
            Empty for a file without one.
        verified_ns: Time of change, in nanoseconds, of the copy on this machine that was
            verified; 0 if none was.
    """

    size: int
    digest: str = ""
    verified_ns: int = 0


@dataclass(frozen=True)
class Held:
    """What this machine holds of a revision.

    Attributes:
        files: The files of the revision.
        paths: Where those are that can be read here: whole, or only their heads.
    """

    files: Mapping[str, RemoteFile]
    paths: Mapping[str, Path]


@dataclass(frozen=True)
class Records:
    """The records of one checkpoint's revisions, beside the copies of their files.

    A record has the hub's list of files, when which was verified, and the heads of weight files
    that were looked into but are not needed. With it a revision opens without the hub.

    Attributes:
        home: The folder of the records and of the revisions that names stood for.
    """

    home: Path

    def revision(self, name: str) -> str:
        """The revision that a name stood for when it was last used; empty if it never was."""
        with suppress(ModelError, ValueError):
            return read_range(self.home / "refs" / name, name, 0, _MAX_NAME_BYTES).decode().strip()
        return ""

    def recorded(self, revision: str, folder: Path) -> Held | None:
        """What was fetched of a revision into a folder, if what was verified is as it was then."""
        try:
            path = self._record(revision) / "files.json"
            record = json.loads(read_range(path, path.name, 0, _MAX_BYTES))
            files = {name: RemoteFile(**fields) for name, fields in record.items()}
            paths = {n: folder / n for n, file in files.items() if file.verified_ns}
            stats = {name: os.stat(path) for name, path in paths.items()}
        except (ModelError, OSError, ValueError, TypeError, AttributeError):
            return None
        if (
            not paths
            or not all(map(within, files))
            or any(
                (stat.st_size, stat.st_mtime_ns) != (files[name].size, files[name].verified_ns)
                for name, stat in stats.items()
            )
        ):
            return None
        heads = {name: self._head(revision, name) for name in files.keys() - paths.keys()}
        return Held(files, paths | {n: path for n, path in heads.items() if path.exists()})

    def record(
        self, name: str, revision: str, files: Mapping[str, RemoteFile], heads: Mapping[str, bytes]
    ) -> None:
        """Remembers a revision that was fetched; a cache that cannot be written stays as it is.

        Args:
            name: What the revision was asked for as.
            revision: What that stood for.
            files: All its files.
            heads: The beginnings of files that were read remotely.
        """
        contents = {
            self._head(revision, file): head
            for file, head in heads.items()
            if not files[file].verified_ns
        }
        record = {name: asdict(file) for name, file in files.items()}
        contents[self._record(revision) / "files.json"] = json.dumps(record).encode()
        if name != revision:
            contents[self.home / "refs" / name] = revision.encode()
        with suppress(OSError):
            for path, content in contents.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
                partial.write_bytes(content)
                os.replace(partial, path)

    def _record(self, revision: str) -> Path:
        return self.home / "moorage" / revision

    def _head(self, revision: str, name: str) -> Path:
        return self._record(revision) / "heads" / name
