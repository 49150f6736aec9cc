"""What the blocking and the asyncio client share: address, options, stubs and resuming."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from moorage import decode
from moorage.answers import LoadProgress, Model
from moorage.errors import Error, FailedPrecondition, InternalError, Unavailable
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc

DEFAULT_ADDRESS = "127.0.0.1:8470"

OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", 4 << 20),  # chunks are at most 1 MiB
    ("grpc.max_metadata_size", 1 << 20),  # an error that lists every misfit of a checkpoint
    ("grpc.absolute_max_metadata_size", 1 << 20),
    ("grpc.keepalive_time_ms", 60_000),  # notices a host that is gone during a long call
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)

ATTEMPTS = 5
"""How often one load resumes after a broken connection."""

FIRST_PAUSE = 0.25
"""Seconds before the first resumption; each further one waits twice as long."""


class Call(Protocol):
    """A running gRPC call, sync or asyncio."""

    def cancel(self) -> Any:
        """Ends the call if it still runs."""
        ...


_C = TypeVar("_C", bound=Call)


@dataclass(frozen=True)
class Stubs:
    """The services' stubs over one channel; generated code, hence untyped."""

    naming: Any
    models: Any
    scoring: Any
    server: Any


def stubs(channel: Any) -> Stubs:
    """Makes the stubs.

    Args:
        channel: A grpc.Channel or a grpc.aio.Channel.

    Returns:
        The stubs, whose calls are of the channel's kind.
    """
    return Stubs(
        naming=pb_grpc.NamingServiceStub(channel),
        models=pb_grpc.ModelServiceStub(channel),
        scoring=pb_grpc.ScoringServiceStub(channel),
        server=pb_grpc.ServerServiceStub(channel),
    )


def address_of(address: str | None) -> str:
    """Says which server is meant: the argument, else MOORAGE_SERVER, else the default."""
    return address or os.environ.get("MOORAGE_SERVER") or DEFAULT_ADDRESS


def handle_of(model: Model[Any] | str) -> str:
    """Gives the handle of a model that is named by itself or by its handle."""
    return model if isinstance(model, str) else model.handle


@contextmanager
def cancelling(call: _C) -> Iterator[_C]:
    """Cancels a streaming call at the end of its block, if it still runs.

    Args:
        call: The call.

    Yields:
        The call.
    """
    try:
        yield call
    finally:
        call.cancel()


class LoadWatch:
    """Follows one load over as many calls as it takes; does no I/O.

    Args:
        on_progress: Called with each progress.
    """

    def __init__(self, on_progress: Callable[[LoadProgress], None]) -> None:
        self._on_progress = on_progress
        self._answered = False
        self._resumed = 0

    def see(self, response: pb.LoadModelResponse) -> pb.Model | None:
        """Takes the next message.

        Args:
            response: Progress, or the model.

        Returns:
            The model if the load is done, else None.
        """
        self._answered = True
        if response.HasField("progress"):
            self._on_progress(decode.load_progress(response.progress))
        return response.model if response.HasField("model") else None

    def pause(self, error: Error) -> float:
        """Decides what follows a failed call.

        Args:
            error: Why it failed.

        Returns:
            Seconds to wait before LoadModel is called again.

        Raises:
            Error: `error` itself, if the connection did not break in mid-load, or too often.
        """
        broken = isinstance(error, Unavailable) and not error.reason
        if not broken or not self._answered or self._resumed == ATTEMPTS:
            raise error
        self._resumed += 1
        return FIRST_PAUSE * 2.0 ** (self._resumed - 1)

    def unfinished(self) -> Error:
        """Makes the error for a stream that ended well, but without the model."""
        return InternalError("the load ended without a model; call load() again")


def closed(address: str) -> Error:
    """Makes the error for a call on a closed client."""
    return FailedPrecondition(f"the client of {address} is closed; connect() again")
