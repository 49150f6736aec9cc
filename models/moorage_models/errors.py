"""The package's one exception, with a reason from one list."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a model cannot be named, loaded or run; names as in the wire's `ErrorReason`."""

    MODEL_ID_UNPARSEABLE = "MODEL_ID_UNPARSEABLE"
    MODEL_FAMILY_UNKNOWN = "MODEL_FAMILY_UNKNOWN"
    CONFIG_UNKNOWN = "CONFIG_UNKNOWN"
    CHECKPOINT_UNSUPPORTED = "CHECKPOINT_UNSUPPORTED"
    SOURCE_NOT_ALLOWED = "SOURCE_NOT_ALLOWED"
    SOURCE_UNAVAILABLE = "SOURCE_UNAVAILABLE"
    DISK_FULL = "DISK_FULL"
    MODEL_PATH_REQUIRED = "MODEL_PATH_REQUIRED"
    SOURCE_AUTH_REQUIRED = "SOURCE_AUTH_REQUIRED"
    CHECKPOINT_NOT_FOUND = "CHECKPOINT_NOT_FOUND"
    CHECKPOINT_MISMATCH = "CHECKPOINT_MISMATCH"
    CHECKPOINT_CORRUPT = "CHECKPOINT_CORRUPT"
    DEVICE_BUDGET_EXCEEDED = "DEVICE_BUDGET_EXCEEDED"
    LOAD_CANCELLED = "LOAD_CANCELLED"
    INVALID_REQUEST = "INVALID_REQUEST"


class ModelError(Exception):
    """A model cannot be named, loaded or run.

    Attributes:
        reason: Why, from a fixed list.
        message: What was asked, what was found, what would work. Holds no path of the host.
        details: The parts of the message that a program may want, as strings.
    """

    def __init__(self, reason: Reason, message: str, **details: str) -> None:
        # A name in a file may hold half a character, which no wire takes.
        message = message.encode(errors="backslashreplace").decode()
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.details = details
