"""The exceptions of moorage: one root, one class for each kind, and the tables that choose."""

# ruff: noqa: N818 (the names are those of the gRPC codes)
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

DOMAIN = "moorage"

_M = TypeVar("_M", bound=Message)


class Error(Exception):
    """Root of every exception that moorage raises.

    Attributes:
        message: What was asked, what was found, what would work.
        reason: The wire's ErrorReason without its prefix, such as "QUEUE_FULL", or "" where the
            client or gRPC itself refused.
        code: The gRPC status code.
        details: Facts that the server attached, by name: of DEVICE_BUDGET_EXCEEDED needed_bytes,
            free_bytes and leased_bytes; of every error request_id, to find it in the server's log.
        retry_after: Seconds to wait before the next attempt, or None.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: grpc.StatusCode | None = None,
        details: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.code = code or type(self).code
        self.details = dict(details or {})
        self.retry_after = retry_after

    def __str__(self) -> str:
        request = self.details.get("request_id")
        return f"{self.message} (request {request})" if request else self.message


class InvalidRequest(Error):
    """The request is wrong in itself; no server would take it."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(Error):
    """The model, configuration, checkpoint or lease does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class PermissionDenied(Error):
    """The server, or the source behind it, does not allow this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(Error):
    """The caller did not say who it is."""

    code = grpc.StatusCode.UNAUTHENTICATED


class Unavailable(Error):
    """The server or the source cannot be reached now; trying again may help."""

    code = grpc.StatusCode.UNAVAILABLE


class ResourceExhausted(Error):
    """Device memory, disk, the queue or a limit is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class MessageTooLarge(Error):
    """One message is larger than gRPC lets through; split the batch."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(Error):
    """The state of the server, the model or the checkpoint stands against the request."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Unsupported(Error):
    """The server cannot do this."""

    code = grpc.StatusCode.UNIMPLEMENTED


class DataLoss(Error):
    """Bytes are damaged or missing, in a checkpoint or on the wire."""

    code = grpc.StatusCode.DATA_LOSS


class Cancelled(Error):
    """The call or the load was cancelled."""

    code = grpc.StatusCode.CANCELLED


class DeadlineExceeded(Error):
    """No answer came in time."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class InternalError(Error):
    """A fault of the server."""

    code = grpc.StatusCode.INTERNAL


REASONS: Mapping[str, type[Error]] = {
    "MODEL_ID_UNPARSEABLE": InvalidRequest,
    "MODEL_FAMILY_UNKNOWN": InvalidRequest,
    "CONFIG_UNKNOWN": NotFound,
    "CHECKPOINT_UNSUPPORTED": Unsupported,
    "SOURCE_NOT_ALLOWED": PermissionDenied,
    "SOURCE_UNAVAILABLE": Unavailable,
    "DISK_FULL": ResourceExhausted,
    "MODEL_PATH_REQUIRED": InvalidRequest,
    "SOURCE_AUTH_REQUIRED": PermissionDenied,
    "CHECKPOINT_NOT_FOUND": NotFound,
    "CHECKPOINT_MISMATCH": FailedPrecondition,
    "CHECKPOINT_CORRUPT": DataLoss,
    "DEVICE_BUDGET_EXCEEDED": ResourceExhausted,
    "QUEUE_FULL": ResourceExhausted,
    "SERVER_DRAINING": Unavailable,
    "LOAD_CANCELLED": Cancelled,
    "LEASE_UNKNOWN": NotFound,
    "PERMISSION_DENIED": PermissionDenied,
    "LIMIT_EXCEEDED": ResourceExhausted,
    "MODEL_LEASED": FailedPrecondition,
    "MODEL_NOT_LOADED": NotFound,
    "WEIGHTS_VERSION_MISMATCH": FailedPrecondition,
    "SEQUENCE_TOO_LONG": InvalidRequest,
    "OUTPUT_TOO_LARGE": InvalidRequest,
    "TOKEN_OUT_OF_RANGE": InvalidRequest,
    "ROW_EMPTY": InvalidRequest,
    "OUTPUT_NOT_SERVED": FailedPrecondition,
    "NON_FINITE_OUTPUT": InternalError,
    "ACCELERATOR_BUSY": FailedPrecondition,
    "UNAUTHENTICATED": Unauthenticated,
    "INVALID_REQUEST": InvalidRequest,
    "INTERNAL": InternalError,
    "DEADLINE_TOO_SHORT": DeadlineExceeded,
}
"""Which exception a reason raises; a reason that is not here goes by its code."""

CODES: Mapping[grpc.StatusCode, type[Error]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: FailedPrecondition,
    grpc.StatusCode.ALREADY_EXISTS: FailedPrecondition,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNKNOWN: InternalError,
}
"""Which exception a bare code raises, where gRPC or something between speaks for the server."""

_HINTS: Mapping[type[Error], str] = {
    Unavailable: "{address} does not answer ({text}); `moorage serve` must be running there",
    Unsupported: "{address} does not know this call ({text}); it must run `moorage serve`, "
    "in the version of this client",
    DeadlineExceeded: "{address} gave no answer in time ({text}); give the call, or connect(), a "
    "longer timeout",
    MessageTooLarge: "one message is too large for gRPC ({text}); split the batch into smaller "
    "ones, or ask for fewer outputs",
}


_HANDSHAKE_HINTS: Mapping[str, str] = {
    "CERTIFICATE_VERIFY_FAILED": "{address} shows a certificate that cannot be trusted ({text}); "
    "Tls(ca=...) names who may have signed it",
    "Hostname Verification": "{address} shows a certificate of another host ({text}); "
    "Tls(server_name=...) names the one that is meant",
    "WRONG_VERSION_NUMBER": "{address} does not speak TLS ({text}); connect(tls=False)",
    "Socket closed": "{address} hung up ({text}); it may want TLS, or TLS with a certificate of "
    "this client that it trusts: connect(tls=moorage.Tls(...))",
}
"""What a failed handshake means, by gRPC's words for it."""


def from_rpc(error: grpc.RpcError, address: str) -> Error:
    """Makes the exception that stands for a failed call.

    Args:
        error: What gRPC raised; sync and asyncio calls alike.
        address: The server that was called, for the message.

    Returns:
        The exception, for the caller to raise.
    """
    call: Any = error  # every RpcError that a call raises is the call as well
    code, text = call.code(), call.details() or ""
    info = _detail(call, error_details_pb2.ErrorInfo)
    if info is None or info.domain != DOMAIN:
        kind = CODES.get(code, InternalError)
        if kind is ResourceExhausted and "larger than max" in text:
            kind = MessageTooLarge
        hint = _HINTS.get(kind, "{text}")
        if kind is Unavailable and "failed to connect" in text:
            hint = next((h for words, h in _HANDSHAKE_HINTS.items() if words in text), hint)
        return kind(hint.format(address=address, text=text or code.name), code=code)
    retry = _detail(call, error_details_pb2.RetryInfo)
    return REASONS.get(info.reason, CODES.get(code, InternalError))(
        text,
        reason=info.reason,
        code=code,
        details=info.metadata,
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
    )


@contextmanager
def translated(address: str) -> Iterator[None]:
    """Turns gRPC's exceptions into ours within its block.

    Args:
        address: The server that is called.

    Yields:
        Nothing.

    Raises:
        Error: In place of any grpc.RpcError.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error, address) from error


def _detail(call: Any, kind: type[_M]) -> _M | None:
    message = kind()
    try:
        status = rpc_status.from_call(call)
        found = status is not None and any(detail.Unpack(message) for detail in status.details)
    except (ValueError, DecodeError):  # something between rewrote the status
        return None
    return message if found else None
