"""Opens a checkpoint's files: regular ones only, and only where they may really lie."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from moorage_models.errors import ModelError, Reason


def open_regular(path: Path, name: str, roots: Sequence[Path] | None = None) -> int:
    """Opens a file for reading; a pipe or a device is neither waited for nor read.

    What is looked at is what was opened: no link can be put in its place between the two.

    Args:
        path: The file.
        name: Its name, for messages.
        roots: Directories, without symbolic links, one of which it must really lie under; None
            allows any.

    Returns:
        The descriptor.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if it cannot be opened or is no regular file;
            SOURCE_NOT_ALLOWED if it lies elsewhere.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # a null byte in the name is a ValueError
        raise unreadable(name, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise not_regular(name)
        if roots is not None and not lies_under(os.readlink(opened_path(descriptor)), roots):
            raise outside(name)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_range(
    path: Path, name: str, start: int, stop: int, roots: Sequence[Path] | None = None
) -> bytes:
    """The bytes `start .. stop` of a file, or as many of them as it has.

    Raises:
        ModelError: As `open_regular`.
    """
    with os.fdopen(open_regular(path, name, roots), "rb") as file:
        try:
            file.seek(start)
            return file.read(stop - start)
        except OSError as error:
            raise unreadable(name, error) from error


def below(folder: Path) -> Iterator[Path]:
    """Everything in a folder and below it; linked folders are not entered."""
    pending = [folder]
    while pending:
        with suppress(OSError):  # it is gone, not ours to read, or too deep for a path
            for path in pending.pop().iterdir():
                yield path
                if os.path.isdir(path) and not os.path.islink(path):
                    pending.append(path)


def opened_path(descriptor: int) -> str:
    """A path that is what a descriptor was opened on, whatever became of the name."""
    return f"/proc/self/fd/{descriptor}"


def lies_under(path: str | Path, roots: Sequence[Path]) -> bool:
    """Whether a real path is that of a root or lies below one."""
    return any(Path(path).is_relative_to(root) for root in roots)


def unreadable(name: str, error: Exception) -> ModelError:
    """A file that the system does not open or read."""
    why = getattr(error, "strerror", None) or "its name cannot be"
    return ModelError(Reason.CHECKPOINT_CORRUPT, f"{name} cannot be read: {why}")


def not_regular(name: str) -> ModelError:
    """A pipe, a device, a socket or a directory in place of a file."""
    return ModelError(Reason.CHECKPOINT_CORRUPT, f"{name} is not a regular file")


def outside(what: str) -> ModelError:
    """A path or a file that a link takes out of the roots."""
    return ModelError(
        Reason.SOURCE_NOT_ALLOWED,
        f"{what!r} is not under a directory that this server may read (moorage serve --root)",
    )
