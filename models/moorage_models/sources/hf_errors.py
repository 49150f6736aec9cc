"""What the Hugging Face Hub's client raises, as ModelErrors."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import errors

from moorage_models.errors import ModelError, Reason

T = TypeVar("T")

_ACCESS = (
    "accept the terms on the model's page, and set HF_TOKEN on the server to a token of an "
    "account that may read it"
)

#: The hub's errors, the most special first: several derive from one another.
_ERRORS: tuple[tuple[type[Exception], Reason, str], ...] = (
    (errors.GatedRepoError, Reason.SOURCE_AUTH_REQUIRED, f"access is restricted: {_ACCESS}"),
    (
        errors.RepositoryNotFoundError,
        Reason.CHECKPOINT_NOT_FOUND,
        "there is no such repository: check the id; a private one needs HF_TOKEN set on the server",
    ),
    (
        errors.RevisionNotFoundError,
        Reason.CHECKPOINT_NOT_FOUND,
        "there is no such revision: give a branch, a tag or a commit of the repository",
    ),
    (errors.RemoteEntryNotFoundError, Reason.CHECKPOINT_NOT_FOUND, "a file is not there any more"),
    (errors.HFValidationError, Reason.CHECKPOINT_NOT_FOUND, "this cannot be a repository's id"),
    (
        errors.OfflineModeIsEnabled,
        Reason.SOURCE_UNAVAILABLE,
        "HF_HUB_OFFLINE is set, and the whole checkpoint is not on this machine",
    ),
)

#: The same by status, where the hub gives no code with it.
_STATUSES = {
    401: (Reason.SOURCE_AUTH_REQUIRED, f"HF_TOKEN was refused: {_ACCESS}"),
    403: (Reason.SOURCE_AUTH_REQUIRED, f"access is forbidden: {_ACCESS}"),
    404: (Reason.CHECKPOINT_NOT_FOUND, "the Hugging Face Hub knows no such file"),
}

_FULL = "the disk that downloads go to is full: free some, or set HF_HOME to another"
_UNWRITABLE = "the folder that downloads go to cannot be written: set HF_HOME to one that can"
_DISK = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _UNWRITABLE,
    errno.EPERM: _UNWRITABLE,
    errno.EROFS: _UNWRITABLE,
}

#: Where the HTTP clients of the hub's releases raise from, none of which is imported here.
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")


@contextmanager
def mapped(label: str) -> Iterator[None]:
    """Turns what the hub's client raises into a ModelError.

    Args:
        label: Names the checkpoint in the message.

    Raises:
        ModelError: SOURCE_AUTH_REQUIRED, CHECKPOINT_NOT_FOUND, DISK_FULL or SOURCE_UNAVAILABLE.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        found = _explain(error)
        if found is None:
            raise
        raise ModelError(found[0], f"{label}: {found[1]}") from error


def persist(action: Callable[[], T], label: str, pauses: Sequence[float]) -> T:
    """Does something with the hub, again after a while if the hub or the connection fails.

    Args:
        action: What to do.
        label: Names the checkpoint in messages.
        pauses: Seconds to wait before each further attempt.

    Raises:
        ModelError: As `mapped` says, from the last attempt.
    """
    for pause in (*pauses, None):
        try:
            with mapped(label):
                return action()
        except ModelError as error:
            # After these the hub's client has itself tried again, or was told not to.
            final = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
            if (
                pause is None
                or error.reason is not Reason.SOURCE_UNAVAILABLE
                or isinstance(error.__cause__, final)
            ):
                raise
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _explain(error: Exception) -> tuple[Reason, str] | None:
    """The reason and a hint; None for what is no failure of the hub, the network or the disk."""
    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        return _explain(cause)  # it only says that the cache cannot help
    for kind, reason, hint in _ERRORS:
        if isinstance(error, kind):
            return reason, hint
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        down = (Reason.SOURCE_UNAVAILABLE, f"the Hugging Face Hub answers {status}: try later")
        return _STATUSES.get(status, down)
    if disk := _DISK.get(_system_error(error)):
        return Reason.DISK_FULL, disk
    if isinstance(error, OSError | RuntimeError) or _transport(error):
        return (
            Reason.SOURCE_UNAVAILABLE,
            "the connection to the Hugging Face Hub fails: try later; a commit that is whole on "
            "this machine loads without it",
        )
    return None


def _transport(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in _TRANSPORTS


def _system_error(error: Exception) -> int:
    """The errno of an error, or 0; hf_xet raises RuntimeErrors that only name it in their text."""
    if isinstance(error, OSError):
        return error.errno or 0
    named = re.search(r"\(os error (\d+)\)", str(error))
    return int(named[1]) if named else 0
