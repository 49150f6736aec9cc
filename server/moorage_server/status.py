"""Errors on the wire: one table from reasons to codes, and the interceptor that applies it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from moorage_models.errors import ModelError
from moorage_server.errors import ServerError

DOMAIN = "moorage"

#: Trailers are limited to some kilobytes.
_MAX_MESSAGE = 2000

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
    "MODEL_NOT_LOADED": grpc.StatusCode.NOT_FOUND,
    "SEQUENCE_TOO_LONG": grpc.StatusCode.INVALID_ARGUMENT,
    "OUTPUT_TOO_LARGE": grpc.StatusCode.INVALID_ARGUMENT,
    "TOKEN_OUT_OF_RANGE": grpc.StatusCode.INVALID_ARGUMENT,
    "ROW_EMPTY": grpc.StatusCode.INVALID_ARGUMENT,
    "OUTPUT_NOT_SERVED": grpc.StatusCode.FAILED_PRECONDITION,
    "NON_FINITE_OUTPUT": grpc.StatusCode.INTERNAL,
    "SERVER_DRAINING": grpc.StatusCode.UNAVAILABLE,
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
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))
    code = CODES[reason].value[0]
    return status_pb2.Status(code=code, message=message[:_MAX_MESSAGE], details=[detail])


async def _abort(context: Any, error: Exception) -> NoReturn:
    await context.abort_with_status(rpc_status.to_status(status_of(error)))
    raise AssertionError("abort returned")


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
        codec = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream), *codec)
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary), *codec)


def _unary(behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return call


def _stream(behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return call
