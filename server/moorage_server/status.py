"""Errors on the wire: one table from reasons to codes."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from moorage_models.errors import ModelError
from moorage_server.convert import duration
from moorage_server.errors import ServerError

DOMAIN = "moorage"

#: Clients take 8 KiB of trailers by default. The message is in them twice, percent-encoded and in
#: base 64: at most four and a third bytes for each of its own.
_MAX_MESSAGE_BYTES = 1700

CODES: dict[str, grpc.StatusCode] = {
    "MODEL_ID_UNPARSEABLE": grpc.StatusCode.INVALID_ARGUMENT,
    "MODEL_FAMILY_UNKNOWN": grpc.StatusCode.INVALID_ARGUMENT,
    "CONFIG_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "CHECKPOINT_UNSUPPORTED": grpc.StatusCode.UNIMPLEMENTED,
    "SOURCE_NOT_ALLOWED": grpc.StatusCode.PERMISSION_DENIED,
    "SOURCE_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "DISK_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "MODEL_PATH_REQUIRED": grpc.StatusCode.INVALID_ARGUMENT,
    "SOURCE_AUTH_REQUIRED": grpc.StatusCode.PERMISSION_DENIED,
    "CHECKPOINT_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "CHECKPOINT_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
    "CHECKPOINT_CORRUPT": grpc.StatusCode.DATA_LOSS,
    "DEVICE_BUDGET_EXCEEDED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "LOAD_CANCELLED": grpc.StatusCode.CANCELLED,
    "LEASE_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "MODEL_LEASED": grpc.StatusCode.FAILED_PRECONDITION,
    "MODEL_NOT_LOADED": grpc.StatusCode.NOT_FOUND,
    "SEQUENCE_TOO_LONG": grpc.StatusCode.INVALID_ARGUMENT,
    "OUTPUT_TOO_LARGE": grpc.StatusCode.INVALID_ARGUMENT,
    "TOKEN_OUT_OF_RANGE": grpc.StatusCode.INVALID_ARGUMENT,
    "ROW_EMPTY": grpc.StatusCode.INVALID_ARGUMENT,
    "QUEUE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "DEADLINE_TOO_SHORT": grpc.StatusCode.DEADLINE_EXCEEDED,
    "WEIGHTS_VERSION_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
    "OUTPUT_NOT_SERVED": grpc.StatusCode.FAILED_PRECONDITION,
    "NON_FINITE_OUTPUT": grpc.StatusCode.INTERNAL,
    "SERVER_DRAINING": grpc.StatusCode.UNAVAILABLE,
    "ACCELERATOR_BUSY": grpc.StatusCode.FAILED_PRECONDITION,
    "INVALID_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
    "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
    "PERMISSION_DENIED": grpc.StatusCode.PERMISSION_DENIED,
    "LIMIT_EXCEEDED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "INTERNAL": grpc.StatusCode.INTERNAL,
}


def reason_of(error: Exception) -> str:
    """The reason on the wire of what was raised: an exception that is not ours is a bug."""
    return str(error.reason) if isinstance(error, ModelError | ServerError) else "INTERNAL"


def status_of(error: Exception, request_id: str) -> status_pb2.Status:
    """The status that tells a caller what went wrong.

    Of a bug the caller gets the id to find it by in the log, and nothing else.

    Args:
        error: What was raised.
        request_id: The request's id in the log.
    """
    reason, metadata = reason_of(error), {"request_id": request_id}
    if isinstance(error, ModelError | ServerError):
        message, metadata = error.message, error.details | metadata
    else:
        message = f"a bug in the server; its log has the details under {request_id}"
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    ]
    if isinstance(error, ServerError) and error.retry_after is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after)))
    code: int = CODES[reason].value[0]
    return status_pb2.Status(code=code, message=_short(message), details=map(_packed, details))


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _short(message: str) -> str:
    cut = message.encode()[:_MAX_MESSAGE_BYTES].decode(errors="ignore")
    return message if cut == message else f"{cut} ... (cut; the server's log has more)"
