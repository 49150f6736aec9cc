"""Errors on the wire: one table from reasons to codes, and the interceptor that applies it."""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from moorage_models.errors import ModelError
from moorage_server.convert import duration
from moorage_server.errors import Reason, ServerError

DOMAIN = "moorage"

#: Clients take 8 KiB of trailers by default. The message is in them twice, percent-encoded and in
#: base 64: at most four and a third bytes for each of its own.
_MAX_MESSAGE_BYTES = 1700

Behaviour: TypeAlias = Callable[..., Any]
Parse: TypeAlias = Callable[[bytes], Any]

_log = logging.getLogger(__name__)

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
    "INTERNAL": grpc.StatusCode.INTERNAL,
}


def status_of(error: Exception) -> status_pb2.Status:
    """The status that tells a caller what went wrong.

    An exception that is not ours is a bug: the caller gets a number to find it by in the log, and
    nothing else.
    """
    if isinstance(error, ModelError | ServerError):
        reason, message, metadata = str(error.reason), error.message, error.details
    else:
        number = uuid.uuid4().hex[:12]
        _log.error("unexpected error %s", number, exc_info=error)
        reason, metadata = "INTERNAL", {"error_id": number}
        message = f"a bug in the server; its log has the details under {number}"
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    ]
    if isinstance(error, ServerError) and error.retry_after is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after)))
    code = CODES[reason].value[0]
    return status_pb2.Status(code=code, message=_short(message), details=map(_packed, details))


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _short(message: str) -> str:
    cut = message.encode()[:_MAX_MESSAGE_BYTES].decode(errors="ignore")
    return message if cut == message else f"{cut} ... (cut; the server's log has the rest)"


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Turns the exceptions of every servicer into statuses."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handlers that answer with a message or a stream of messages."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        # Requests are parsed in here, so that a malformed one is answered as any other error is.
        parse, codec = handler.request_deserializer, (None, handler.response_serializer)
        if handler.response_streaming:
            stream = _stream(handler.unary_stream, parse)
            return grpc.unary_stream_rpc_method_handler(stream, *codec)
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, parse), *codec)


# Both wrappers abort outside of their `except`. gRPC keeps the abort's exception until the next
# call arrives, and through its context and frames it would keep the arrays of a failed load.


def _unary(behaviour: Behaviour, parse: Parse) -> Callable[..., Awaitable[Any]]:
    async def call(data: bytes, context: Any) -> Any:
        try:
            return await behaviour(_parsed(parse, data), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            status = rpc_status.to_status(status_of(error))
        return await context.abort_with_status(status)

    return call


def _stream(behaviour: Behaviour, parse: Parse) -> Callable[..., AsyncIterator[Any]]:
    async def call(data: bytes, context: Any) -> AsyncIterator[Any]:
        try:
            responses = behaviour(_parsed(parse, data), context)
            if inspect.isawaitable(responses):  # the health service writes its answers itself
                await responses
                return
            async for response in responses:
                yield response
            return
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            status = rpc_status.to_status(status_of(error))
        await context.abort_with_status(status)

    return call


def _parsed(parse: Parse, data: bytes) -> Any:
    try:
        return parse(data)
    except DecodeError as error:
        message = "the request is not a message of this method; use the stubs of moorage.v1"
        raise ServerError(Reason.INVALID_REQUEST, message) from error
