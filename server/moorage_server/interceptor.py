"""Around every call: who makes it, whether it may, and what its caller is told if it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc_status import rpc_status

from moorage_server.access import Access, role_for
from moorage_server.activity import Activity
from moorage_server.calls import CURRENT, Call
from moorage_server.errors import Reason, ServerError
from moorage_server.limits import Gate
from moorage_server.logs import one_line
from moorage_server.status import CODES, reason_of, status_of

Behaviour: TypeAlias = Callable[..., Any]
Parse: TypeAlias = Callable[[Any], Any]

_log = logging.getLogger(__name__)


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the handlers of every service."""

    def __init__(self, access: Access, gate: Gate, activity: Activity) -> None:
        self._access = access
        self._gate = gate
        self._activity = activity
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The wrapped handler of a method; None for one that there is not.

        A caller that is not known is refused before its request is read, which may be large.
        """
        method: str = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[method] = self._wrapped(method, handler)
        try:
            self._access.caller_with(handler_call_details.invocation_metadata)
        except ServerError as error:
            return self._refusing(method, error)
        return self._handlers[method]

    def _refusing(self, method: str, error: ServerError) -> Any:
        """A handler that reads nothing: gRPC would read the request of any but a stream."""

        def refuse(requests: Any, context: Any) -> Any:
            raise error

        stream = self._stream(method, refuse, lambda requests: requests)
        return grpc.stream_stream_rpc_method_handler(stream)

    def _wrapped(self, method: str, handler: Any) -> Any:
        """Wraps a handler; requests are parsed in here, so that bad ones are answered as others."""
        parse, codec = handler.request_deserializer, (None, handler.response_serializer)
        if handler.request_streaming:  # reflection, whose requests gRPC parses
            stream = self._stream(method, handler.stream_stream, lambda requests: requests)
            return grpc.stream_stream_rpc_method_handler(stream, parse, codec[1])
        if handler.response_streaming:
            stream = self._stream(method, handler.unary_stream, parse)
            return grpc.unary_stream_rpc_method_handler(stream, *codec)
        unary = self._unary(method, handler.unary_unary, parse)
        return grpc.unary_unary_rpc_method_handler(unary, *codec)

    # Both wrappers abort outside of their `except`. gRPC keeps the abort's exception until the next
    # call arrives, and through its context and frames it would keep the arrays of a failed load.

    def _unary(
        self, method: str, behaviour: Behaviour, parse: Parse
    ) -> Callable[..., Awaitable[Any]]:
        async def answer(data: bytes, context: Any) -> Any:
            call = Call.of(method, context)
            try:
                with self._passing(call, method, context):
                    return await behaviour(_parsed(parse, data), context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                status = self._refused(call, error)
            return await context.abort_with_status(rpc_status.to_status(status))

        return answer

    def _stream(
        self, method: str, behaviour: Behaviour, parse: Parse
    ) -> Callable[..., AsyncIterator[Any]]:
        async def answer(data: Any, context: Any) -> AsyncIterator[Any]:
            call = Call.of(method, context)
            try:
                with self._passing(call, method, context):
                    async for response in behaviour(_parsed(parse, data), context):
                        yield response
                    return
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                status = self._refused(call, error)
            await context.abort_with_status(rpc_status.to_status(status))

        return answer

    @contextmanager
    def _passing(self, call: Call, method: str, context: Any) -> Iterator[None]:
        """Lets a call pass whose caller may make it; counts it while it runs, and measures it.

        Raises:
            ServerError: UNAUTHENTICATED; PERMISSION_DENIED; LIMIT_EXCEEDED.
        """
        CURRENT.set(call)
        begin, code = time.monotonic(), "OK"
        try:
            call.caller = self._access.caller_of(context)
            call.caller.check(role_for(method), call.method)
            with self._gate.passing(call.caller.name):
                yield
        except BaseException as error:
            code = _code_of(error)
            raise
        finally:
            self._activity.end_call(call, code, time.monotonic() - begin)

    def _refused(self, call: Call, error: Exception) -> status_pb2.Status:
        status, reason = status_of(error, call.request_id), reason_of(error)
        self._activity.refuse(call, reason, status.message)
        seen = (call.method, call.caller.name, reason, one_line(error))
        text = "%s of %s: %s: %s"
        if reason == Reason.INTERNAL:
            _log.error(text, *seen, exc_info=error)
        else:
            _log.info(text, *seen)
        return status


def _code_of(error: BaseException) -> str:
    """The name of the code that a call ends with."""
    if isinstance(error, grpc.aio.AbortError):  # of health, for a service that it does not know
        return grpc.StatusCode.NOT_FOUND.name
    if not isinstance(error, Exception):  # its caller has left
        return grpc.StatusCode.CANCELLED.name
    return CODES[reason_of(error)].name


def _parsed(parse: Parse, data: Any) -> Any:
    try:
        return parse(data)
    except DecodeError as error:
        message = "the request is not a message of this method; use the stubs of moorage.v1"
        raise ServerError(Reason.INVALID_REQUEST, message) from error
