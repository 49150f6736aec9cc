"""What hubs' clients raise, as ModelErrors; and another attempt where that may help."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from moorage_models.errors import ModelError, Reason

T = TypeVar("T")

#: A reason and a hint.
Explanation = tuple[Reason, str]


@dataclass(frozen=True)
class Failures:
    """How the errors of one hub's client are sorted.

    Attributes:
        title: The hub, in messages.
        cache_setting: What to set for another disk.
        credential: What carries the credential.
        access: What to do without access.
        errors: The client's own errors, the most special first, with reasons and hints.
        final: Errors after which the client has itself tried again, or was told not to.
        wrappers: Errors that only say that the cache cannot help; their cause counts.
    """

    title: str
    cache_setting: str
    credential: str
    access: str
    errors: tuple[tuple[type[Exception], Reason, str], ...] = ()
    final: tuple[type[Exception], ...] = ()
    wrappers: tuple[type[Exception], ...] = ()

    def explain(self, error: BaseException) -> Explanation | None:
        """The reason and a hint; None for what is not the hub's, the network's or the disk's."""
        if isinstance(error, self.wrappers) and isinstance(error.__cause__, Exception):
            return self.explain(error.__cause__)
        for kind, reason, hint in self.errors:
            if isinstance(error, kind):
                return reason, hint
        if status := _status(error):
            return self._by_status(status)
        if (number := _system_error(error)) in FULL:
            hint = f"the disk that downloads go to is full: free some, or set {self.cache_setting}"
            return Reason.DISK_FULL, hint
        if number in _UNWRITABLE:
            return (
                Reason.DISK_FULL,
                "the folder that downloads go to cannot be written: set "
                f"{self.cache_setting} to one that can",
            )
        if isinstance(error, OSError | RuntimeError) or _transport(error):
            return (
                Reason.SOURCE_UNAVAILABLE,
                f"the connection to {self.title} fails: try later; what is whole on this machine "
                "loads without it",
            )
        return None

    def _by_status(self, status: int) -> Explanation:
        if status == 401:
            return Reason.SOURCE_AUTH_REQUIRED, f"{self.credential} was refused: {self.access}"
        if status == 403:
            return Reason.SOURCE_AUTH_REQUIRED, f"access is forbidden: {self.access}"
        if status == 404:
            return Reason.CHECKPOINT_NOT_FOUND, f"{self.title} knows no such thing: check the path"
        return Reason.SOURCE_UNAVAILABLE, f"{self.title} answers {status}: try later"


#: The disk, or a quota of it, is full.
FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

#: Where the HTTP clients raise from, none of which is imported here.
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet", "requests", "urllib3")


@contextmanager
def mapped(failures: Failures, label: str) -> Iterator[None]:
    """Turns what a hub's client raises into a ModelError.

    Args:
        failures: How its errors are sorted.
        label: Names the checkpoint in the message.

    Raises:
        ModelError: SOURCE_AUTH_REQUIRED, CHECKPOINT_NOT_FOUND, DISK_FULL or SOURCE_UNAVAILABLE.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        found = failures.explain(error)
        if found is None:
            raise
        raise ModelError(found[0], f"{label}: {found[1]}") from error


def persist(failures: Failures, action: Callable[[], T], label: str, pauses: Sequence[float]) -> T:
    """Does something with a hub, again after a while if the hub or the connection fails.

    Args:
        failures: How its client's errors are sorted.
        action: What to do.
        label: Names the checkpoint in messages.
        pauses: Seconds to wait before each further attempt.

    Raises:
        ModelError: As `mapped` says, from the last attempt.
    """
    for pause in (*pauses, None):
        try:
            with mapped(failures, label):
                return action()
        except ModelError as error:
            if (
                pause is None
                or error.reason is not Reason.SOURCE_UNAVAILABLE
                or isinstance(error.__cause__, failures.final)
            ):
                raise
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _status(error: BaseException) -> int:
    """The HTTP status of an error, or 0."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return int(status) if status is not None else 0


def _transport(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _TRANSPORTS


def _system_error(error: BaseException) -> int:
    """The errno of an error, or 0; hf_xet raises RuntimeErrors that only name it in their text."""
    if isinstance(error, OSError):
        return error.errno or 0
    named = re.search(r"\(os error (\d+)\)", str(error))
    return int(named[1]) if named else 0
