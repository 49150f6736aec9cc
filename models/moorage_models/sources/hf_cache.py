"""What this machine holds of a repository of the Hugging Face Hub, and what of it was verified."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import constants

from moorage_models.errors import ModelError, Reason

COMMIT = re.compile(r"[0-9a-f]{40}")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class HubFile:
    """A file of one commit.

    Attributes:
        size: Its bytes.
        sha256: The digest that the hub states, in hexadecimal; empty for a file without one.
        verified_ns: Time of change, in nanoseconds, of the copy on this machine that was
            verified; 0 if none was.
    """

    size: int
    sha256: str = ""
    verified_ns: int = 0


@dataclass(frozen=True)
class Held:
    """What this machine holds of a commit.

    Attributes:
        files: The files of the commit.
        paths: Where those are that can be read here: whole, or only their heads.
    """

    files: Mapping[str, HubFile]
    paths: Mapping[str, Path]


@dataclass(frozen=True)
class HubCache:
    """Where the files of one repository are kept.

    Beside them lies a record a commit: the hub's list of files, when which was verified, and the
    heads of weight files that were looked into but are not needed. With it a commit opens without
    the hub.

    Attributes:
        home: The folder of the records and of the commits that revisions stood for.
        local_dir: The folder that files are put straight into; None for the hub's cache.
    """

    home: Path
    local_dir: Path | None

    @classmethod
    def of(cls, repo_id: str, local_dir: Path | None) -> HubCache:
        """The place of a repository."""
        name = f"models--{repo_id.replace('/', '--')}"
        base = local_dir / ".cache" / "moorage" if local_dir else Path(constants.HF_HUB_CACHE)
        return cls(base / name, local_dir)

    def folder(self, commit: str) -> Path:
        """The folder of a commit's files."""
        return self.local_dir or self.home / "snapshots" / commit

    def commit(self, revision: str) -> str:
        """The commit that a revision stood for when it was last used; empty if it never was."""
        if COMMIT.fullmatch(revision):
            return revision
        with suppress(OSError, ValueError):
            commit = (self.home / "refs" / revision).read_text().strip()
            return commit if COMMIT.fullmatch(commit) else ""
        return ""

    def recorded(self, commit: str) -> Held | None:
        """What was fetched of a commit, if all that was verified is as it was then."""
        try:
            record = json.loads((self._record(commit) / "files.json").read_text())
            files = {name: HubFile(**fields) for name, fields in record.items()}
            paths = {n: self.folder(commit) / n for n, file in files.items() if file.verified_ns}
            stats = {name: os.stat(path) for name, path in paths.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        if not paths or any(
            (stat.st_size, stat.st_mtime_ns) != (files[name].size, files[name].verified_ns)
            for name, stat in stats.items()
        ):
            return None
        heads = {name: self._head(commit, name) for name in files.keys() - paths.keys()}
        return Held(files, paths | {n: path for n, path in heads.items() if path.exists()})

    def found(self, commit: str) -> Held | None:
        """What others put into the hub's cache of a commit, if it seems to be whole.

        Without the hub's list, whole is: a config, and the files that the index names or
        `model.safetensors`.
        """
        folder = self.folder(commit)
        if self.local_dir or not commit:
            return None
        paths = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        needed = {"config.json", "model.safetensors"}
        try:
            if index := paths.get("model.safetensors.index.json"):
                needed = {"config.json", *json.loads(index.read_bytes())["weight_map"].values()}
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None
        if not needed <= paths.keys():
            return None
        return Held({n: HubFile(p.stat().st_size, _blob(p)) for n, p in paths.items()}, paths)

    def record(
        self, revision: str, commit: str, files: Mapping[str, HubFile], heads: Mapping[str, bytes]
    ) -> None:
        """Remembers a commit that was fetched; a cache that cannot be written stays as it is."""
        contents = {
            self._head(commit, name): head
            for name, head in heads.items()
            if not files[name].verified_ns
        }
        record = {name: asdict(file) for name, file in files.items()}
        contents[self._record(commit) / "files.json"] = json.dumps(record).encode()
        if revision != commit:
            contents[self.home / "refs" / revision] = commit.encode()
        with suppress(OSError):
            for path, content in contents.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
                partial.write_bytes(content)
                os.replace(partial, path)

    def require_space(self, commit: str, files: Mapping[str, HubFile]) -> None:
        """Refuses what cannot fit, before it is fetched.

        Raises:
            ModelError: DISK_FULL, with what is needed and what is free.
        """
        missing = [
            file.size
            for name, file in files.items()
            if not (self.folder(commit) / name).exists()
            and not (file.sha256 and (self.home / "blobs" / file.sha256).exists())
        ]
        folder = next(path for path in (self.home, *self.home.parents) if path.exists())
        free = shutil.disk_usage(folder).free
        if sum(missing) > free:
            raise ModelError(
                Reason.DISK_FULL,
                f"{sum(missing)} bytes are to be fetched, but {free} are free where they would go: "
                "free some, or set HF_HOME or model_download_path to another disk",
            )

    def _record(self, commit: str) -> Path:
        return self.home / "moorage" / commit

    def _head(self, commit: str, name: str) -> Path:
        return self._record(commit) / "heads" / name


def verify(path: Path, name: str, file: HubFile, progress: Callable[[int], None]) -> HubFile:
    """Compares a copy, unless it was verified, with what the hub states; removes it if it differs.

    Args:
        path: The copy.
        name: Its name, for the message.
        file: What the hub states.
        progress: Told of the bytes that were read.

    Returns:
        The file, verified.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if the size or the digest differs.
    """
    stat = os.stat(path)
    if (stat.st_size, stat.st_mtime_ns) == (file.size, file.verified_ns):
        return file
    digest = hashlib.sha256()
    if file.sha256 and stat.st_size == file.size:
        with open(path, "rb") as content:
            while piece := content.read(_PIECE_BYTES):
                digest.update(piece)
                progress(len(piece))
    if stat.st_size != file.size or file.sha256 not in ("", digest.hexdigest()):
        _remove(path)
        raise ModelError(
            Reason.CHECKPOINT_CORRUPT,
            f"{name} is not what the Hugging Face Hub states (size {file.size}, "
            f"sha256 {file.sha256 or 'unknown'}); it was removed: load again to fetch it again",
        )
    return HubFile(file.size, file.sha256, stat.st_mtime_ns)


def _blob(path: Path) -> str:
    """The digest by which the hub's cache names the blob that a large file is a link to."""
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else ""


def _remove(path: Path) -> None:
    """Removes a file with all the links that lead to it: the hub's cache links its blobs."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)
