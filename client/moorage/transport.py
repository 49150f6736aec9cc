"""What the blocking and the asyncio client share: address, options, stubs and resuming."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from moorage import decode
from moorage.answers import Change, LoadProgress, Model, Scorer, T_co
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
"""How often one load resumes after a broken connection, and a watch without an answer between."""

FIRST_PAUSE = 0.25
"""Seconds before the first resumption; each further one waits twice as long."""

OVER = frozenset({"unloaded", "failed", "cancelled"})
"""The states in which a model is gone."""


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

    def see(self, response: pb.LoadModelResponse) -> pb.LoadModelResponse | None:
        """Takes the next message.

        Args:
            response: Progress, or the model.

        Returns:
            The message if it has the model and the load is done, else None.
        """
        self._answered = True
        if response.HasField("progress"):
            self._on_progress(decode.load_progress(response.progress))
        return response if response.HasField("model") else None

    def pause(self, error: Error) -> float:
        """Decides what follows a failed call.

        Args:
            error: Why it failed.

        Returns:
            Seconds to wait before LoadModel is called again.

        Raises:
            Error: `error` itself, if the connection did not break in mid-load, or too often.
        """
        seconds = _pause(error, answered=self._answered, resumed=self._resumed)
        self._resumed += 1
        return seconds

    def unfinished(self) -> Error:
        """Makes the error for a stream that ended well, but without the model."""
        return InternalError("the load ended without a model; call load() again")


class ModelWatch(Generic[T_co]):
    """Follows what becomes of models over as many calls as it takes; does no I/O.

    Args:
        client: Runs the forward passes of the models that are told of.
    """

    def __init__(self, client: Scorer[T_co]) -> None:
        self._client = client
        self._models: dict[str, Model[T_co]] = {}
        self._seen = pb.WatchModelsRequest()
        self._answered = False
        self._resumed = 0

    def request(self) -> pb.WatchModelsRequest:
        """Asks for what comes after all that was seen."""
        return self._seen

    def see(self, response: pb.WatchModelsResponse) -> Change[T_co] | None:
        """Takes the next message.

        Args:
            response: All models, a change, or a heartbeat.

        Returns:
            What has changed; None after a heartbeat.
        """
        self._answered, self._resumed = True, 0
        if response.HasField("snapshot"):
            models = [decode.model(model, self._client) for model in response.snapshot.models]
            self._models = {model.handle: model for model in models}
            changed = None
        elif response.HasField("changed"):
            changed = decode.model(response.changed, self._client)
            self._models[changed.handle] = changed
            if changed.state in OVER:
                del self._models[changed.handle]
        else:
            return None
        self._seen = pb.WatchModelsRequest(epoch=response.epoch, sequence=response.sequence)
        return Change(response.sequence, changed, tuple(self._models.values()))

    def pause(self, error: Error) -> float:
        """Decides what follows a failed call.

        Args:
            error: Why it failed.

        Returns:
            Seconds to wait before WatchModels is called again.

        Raises:
            Error: `error` itself, if the connection did not break in mid-watch, or too often.
        """
        seconds = _pause(error, answered=self._answered, resumed=self._resumed)
        self._resumed += 1
        return seconds

    def unfinished(self) -> Error:
        """Makes the error for a stream that ended well, as none should: the server is stopping."""
        return Unavailable("the server ended the watch; call watch() again")


def _pause(error: Error, *, answered: bool, resumed: int) -> float:
    broken = isinstance(error, Unavailable) and not error.reason
    if not broken or not answered or resumed == ATTEMPTS:
        raise error
    return FIRST_PAUSE * 2.0**resumed


def closed(address: str) -> Error:
    """Makes the error for a call on a closed client."""
    return FailedPrecondition(f"the client of {address} is closed; connect() again")
