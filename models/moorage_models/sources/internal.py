"""INTERNAL: a directory that this machine can read."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_models.regular_files import (
    below,
    lies_under,
    not_regular,
    open_regular,
    outside,
    read_range,
    unreadable,
)
from moorage_models.sources.digests import digest_of
from moorage_models.sources.failures import FULL
from moorage_models.sources.source import ModelRequest, Policy, companions, ignore

_COPY_BYTES = 16 << 20
_MAX_ENTRIES = 40_000  # files and folders


@dataclass(frozen=True)
class Directory:
    """A checkpoint in a directory.

    Attributes:
        folder: The directory, without symbolic links.
        label: The path as the caller gave it.
        files: Sizes of the files in it and below it.
        revision: Digest of the files' names, sizes and times of change.
        copy_to: Where files are copied before they are read; None reads them in place.
        roots: Directories under which the files must really lie; None allows any.
        verify: Whether a fetch reads every byte.
        contents: SHA-256 of the files that were read so.
    """

    folder: Path
    label: str
    files: Mapping[str, int]
    revision: str
    copy_to: Path | None = None
    roots: tuple[Path, ...] | None = None
    verify: bool = False
    contents: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def local(self) -> Path:
        """The directory."""
        return self.folder

    @property
    def key(self) -> str:
        """The directory itself, however it was named."""
        return str(self.folder)

    def claim(self, name: str) -> str:
        """The size of a file, in bytes, and its time of change, in nanoseconds, as they are now."""
        try:
            stat = os.stat(self.folder / name)
        except OSError as error:
            raise unreadable(name, error) from error
        return f"stat:{stat.st_size}:{stat.st_mtime_ns}"

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a file."""
        return read_range(self.folder / name, name, start, stop, self.roots)

    def request(self, name: str, start: int, stop: int) -> bytes:
        """As `read`."""
        return self.read(name, start, stop)

    @property
    def destination(self) -> Path:
        """The directory itself, or the one that files are copied to."""
        return self.copy_to or self.folder

    def fetch(
        self, names: Sequence[str], monitor: LoadMonitor, arrived: Callable[[str], None] = ignore
    ) -> Path:
        """Copies files, unless they are read in place; reads them as a whole to verify them."""
        if self.copy_to is not None:
            names = sorted({*names, *companions(self.files)})
        if passes := (self.copy_to is not None) + self.verify:
            monitor.expect("fetch", passes * sum(self.files[name] for name in names))
        for name in names:
            path = self.destination / name
            if self.copy_to is not None:
                self._copy(name, path, monitor)
            if self.verify:
                advance = partial(monitor.advance, "fetch")
                self.contents[name] = digest_of(path, name, "sha256", advance)
            arrived(name)
        return self.destination

    def _copy(self, name: str, target: Path, monitor: LoadMonitor) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            source = open_regular(self.folder / name, name, self.roots)
            for size in _copy(source, target):
                monitor.advance("fetch", size)
        except OSError as error:
            full = error.errno in FULL
            raise ModelError(
                Reason.DISK_FULL if full else Reason.SOURCE_UNAVAILABLE,
                f"cannot copy {self.label!r} to the download path: {error.strerror}",
            ) from error


def open_directory(request: ModelRequest, policy: Policy) -> Directory:
    """The directory that a request names.

    Raises:
        ModelError: MODEL_PATH_REQUIRED without a path; SOURCE_NOT_ALLOWED outside the roots;
            CHECKPOINT_NOT_FOUND if there is no such directory.
    """
    if not request.model_path:
        raise ModelError(
            Reason.MODEL_PATH_REQUIRED,
            f"source {request.source.name} needs the directory of {request.model_id!r} as "
            "model_path",
        )
    folder = within_roots(request.model_path, policy)
    if not folder.is_dir():
        raise ModelError(
            Reason.CHECKPOINT_NOT_FOUND, f"there is no directory {request.model_path!r}"
        )
    copy_to = download_folder(request.download_path, policy)
    stats = dict(_walk(folder, request.model_path, policy.real_roots))
    digest = hashlib.sha256()
    for name, found in sorted(stats.items()):
        line = f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))  # a name need not be text
    sizes = {name: found.st_size for name, found in stats.items()}
    return Directory(
        folder,
        request.model_path,
        sizes,
        digest.hexdigest()[:16],
        copy_to,
        policy.real_roots,
        policy.verify,
    )


def download_folder(path: str, policy: Policy) -> Path | None:
    """The folder that a request wants files put into, or none.

    Raises:
        ModelError: SOURCE_NOT_ALLOWED if it lies outside the roots, or something in it is a link
            out of them, through which files there could be written or removed.
    """
    if not path:
        return None
    folder = within_roots(path, policy)
    if policy.roots is not None:
        for _ in _walk(folder, path, policy.real_roots):
            pass
    return folder


def _walk(
    folder: Path, label: str, roots: Sequence[Path] | None
) -> Iterator[tuple[str, os.stat_result]]:
    """The files in a folder and below it, all of which lie under a root.

    Linked folders are not entered, and links that lead nowhere are left out.
    """
    for count, path in enumerate(below(folder)):
        if count == _MAX_ENTRIES:
            raise ModelError(
                Reason.INVALID_REQUEST,
                f"{label!r} holds more than {_MAX_ENTRIES} files: name the checkpoint itself",
            )
        name = path.relative_to(folder).as_posix()
        is_link = os.path.islink(path)
        if is_link and roots is not None and not lies_under(os.path.realpath(path), roots):
            raise outside(f"{label}/{name}")
        try:
            found = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            yield name, found
        elif not stat.S_ISDIR(found.st_mode):
            raise not_regular(f"{label}/{name}")


def within_roots(path: str, policy: Policy) -> Path:
    """The real path, which lies under a root; a relative path is looked up under each root."""
    try:
        reals = [(root / path).resolve() for root in policy.roots or (Path.cwd(),)]
        allowed = [real for real in reals if _is_allowed(real, policy)]
        found = next((real for real in allowed if real.exists()), None)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a loop of links
        raise ModelError(Reason.INVALID_REQUEST, f"{path!r} cannot be looked up") from error
    if not allowed:
        raise outside(path)
    return found or allowed[0]


def _is_allowed(real: Path, policy: Policy) -> bool:
    return policy.real_roots is None or lies_under(real, policy.real_roots)


def _copy(source: int, target: Path) -> Iterator[int]:
    """Copies an open file beside a final name, then renames it; yields the sizes of the pieces."""
    partial = target.with_name(target.name + ".partial")
    with os.fdopen(source, "rb") as reader:
        partial.unlink(missing_ok=True)
        try:
            with open(partial, "xb") as writer:  # "x" makes a file, and never follows a link
                while piece := reader.read(_COPY_BYTES):
                    writer.write(piece)
                    yield len(piece)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
