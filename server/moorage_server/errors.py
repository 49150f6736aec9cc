"""The server's one exception, with a reason from the wire's list."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why the server refuses a call, beside the models' own reasons."""

    MODEL_NOT_LOADED = "MODEL_NOT_LOADED"
    DEVICE_BUDGET_EXCEEDED = "DEVICE_BUDGET_EXCEEDED"
    LEASE_UNKNOWN = "LEASE_UNKNOWN"
    MODEL_LEASED = "MODEL_LEASED"
    SEQUENCE_TOO_LONG = "SEQUENCE_TOO_LONG"
    OUTPUT_TOO_LARGE = "OUTPUT_TOO_LARGE"
    TOKEN_OUT_OF_RANGE = "TOKEN_OUT_OF_RANGE"
    ROW_EMPTY = "ROW_EMPTY"
    QUEUE_FULL = "QUEUE_FULL"
    DEADLINE_TOO_SHORT = "DEADLINE_TOO_SHORT"
    WEIGHTS_VERSION_MISMATCH = "WEIGHTS_VERSION_MISMATCH"
    OUTPUT_NOT_SERVED = "OUTPUT_NOT_SERVED"
    NON_FINITE_OUTPUT = "NON_FINITE_OUTPUT"
    SERVER_DRAINING = "SERVER_DRAINING"
    ACCELERATOR_BUSY = "ACCELERATOR_BUSY"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED"
    INVALID_REQUEST = "INVALID_REQUEST"
    INTERNAL = "INTERNAL"


class ServerError(Exception):
    """A call is refused.

    Attributes:
        reason: Why, from a fixed list.
        message: What was asked, what was found, what would work.
        retry_after: Seconds after which it may be taken, or None.
        details: The parts of the message that a program may want, as strings.
    """

    def __init__(
        self, reason: Reason, message: str, *, retry_after: float | None = None, **details: str
    ) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        self.details = details
