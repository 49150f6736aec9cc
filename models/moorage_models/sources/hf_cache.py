"""Where the Hugging Face Hub's client keeps files, and what others may have put there."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import constants

from moorage_models.errors import ModelError
from moorage_models.regular_files import read_range
from moorage_models.sources.record import Held, Records, RemoteFile

_MAX_INDEX_BYTES = 32 << 20

COMMIT = re.compile(r"[0-9a-f]{40}")

#: The digests by which the cache names the blobs of large files, and of others.
_BLOBS = {"sha256": re.compile(r"[0-9a-f]{64}"), "git": COMMIT}


@dataclass(frozen=True)
class HubCache:
    """Where the files of one repository are kept.

    Attributes:
        home: The folder of the repository in the hub's cache, or of its records.
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

    @property
    def records(self) -> Records:
        """The records of what was fetched."""
        return Records(self.home)

    def folder(self, commit: str) -> Path:
        """The folder of a commit's files."""
        return self.local_dir or self.home / "snapshots" / commit

    def commit(self, revision: str) -> str:
        """The commit that a revision stood for when it was last used; empty if it never was."""
        commit = revision if COMMIT.fullmatch(revision) else self.records.revision(revision)
        return commit if COMMIT.fullmatch(commit) else ""

    def held(self, commit: str) -> Held | None:
        """What was fetched of a commit, and verified."""
        return self.records.recorded(commit, self.folder(commit))

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
                content = read_range(index, index.name, 0, _MAX_INDEX_BYTES)
                needed = {"config.json", *json.loads(content)["weight_map"].values()}
        except (ModelError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return None
        if not needed <= paths.keys():
            return None
        return Held({n: RemoteFile(p.stat().st_size, _digest(p)) for n, p in paths.items()}, paths)

    def sweep(self) -> None:
        """Removes half-fetched files of processes that are gone.

        The hub's client, which gives each attempt a file of its own, holds a lock while it writes
        one: a file whose lock is free is an orphan.
        """
        if self.local_dir:
            folder = self.local_dir / ".cache" / "huggingface" / "download"
            partials = list(folder.rglob("*.incomplete"))
            locks = {p: sorted(p.parent.glob("*.lock")) for p in partials}
        else:
            folder = self.home.parent / ".locks" / self.home.name
            partials = list((self.home / "blobs").glob("*.incomplete"))
            locks = {p: [folder / f"{p.name.split('.')[0]}.lock"] for p in partials}
        for partial in partials:
            if all(_is_free(lock) for lock in locks[partial]):
                partial.unlink(missing_ok=True)


def _is_free(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return True
    except (Timeout, OSError):
        return False


def _digest(path: Path) -> str:
    """The digest by which the hub's cache names the blob that a file is a link to."""
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return next((f"{kind}:{name}" for kind, form in _BLOBS.items() if form.fullmatch(name)), "")
