"""Files that are read again when they change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)


class WatchedFile(Generic[T]):
    """What is in some files that belong together, made anew when one of them changes.

    A change that cannot be understood is logged, and what was there before goes on to hold: files
    that belong together cannot be written at the same moment.
    """

    def __init__(self, parse: Callable[[tuple[bytes, ...]], T], *files: Path) -> None:
        """Reads the files.

        Args:
            parse: From their content to what it means; raises ValueError.
            files: The files.

        Raises:
            ValueError: They cannot be read, or understood.
        """
        self._parse = parse
        self._files = files
        self._seen = self._stamps()
        self._value = self._read()

    @property
    def value(self) -> T:
        """What the files mean."""
        self.changed()
        return self._value

    def changed(self) -> bool:
        """Reads the files again if they are not what they were, and says whether that went well."""
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        self._seen = stamps
        try:
            self._value = self._read()
        except ValueError as error:
            _log.error("%s; what was there before still holds", error)
            return False
        _log.info("read %s again", ", ".join(file.name for file in self._files))
        return True

    def _read(self) -> T:
        try:
            return self._parse(tuple(file.read_bytes() for file in self._files))
        except (OSError, ValueError) as error:
            names = ", ".join(str(file) for file in self._files)
            raise ValueError(f"{names}: {error}") from error

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes with a file, links on the way to it included."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
