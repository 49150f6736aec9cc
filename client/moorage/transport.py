"""What the blocking and the asyncio client share: address, options, stubs and resuming."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Generic, Protocol, TypeVar

from moorage import decode
from moorage.answers import Change, LoadProgress, Model, Scorer, T_co
from moorage.errors import Error, FailedPrecondition, InternalError, InvalidRequest, Unavailable
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
    ("grpc.min_reconnect_backoff_ms", 5_000),  # who accepts and says nothing is gone, not slow
)

PATIENCE = 600.0
"""Seconds since its connection broke in which a call is resumed: servers take time to restart."""

BREAKS = 5
"""How often one load is resumed that was answered again: it may be what ends the server."""

_ENDLESS_SECONDS = 1e8  # three years; gRPC's clock ends

FIRST_PAUSE = 0.25
"""Seconds before a call is resumed; as long as there is no answer each pause is twice as long."""

MAX_PAUSE = 5.0
"""Seconds of a pause at the most."""

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


def stubs(channel: Any, carrying: Callable[[Any], Any] = lambda stub: stub) -> Stubs:
    """Makes the stubs.

    Args:
        channel: A grpc.Channel or a grpc.aio.Channel.
        carrying: Makes a stub one whose calls carry what the server wants to know.

    Returns:
        The stubs, whose calls are of the channel's kind.
    """
    return Stubs(
        naming=carrying(pb_grpc.NamingServiceStub(channel)),
        models=carrying(pb_grpc.ModelServiceStub(channel)),
        scoring=carrying(pb_grpc.ScoringServiceStub(channel)),
        server=carrying(pb_grpc.ServerServiceStub(channel)),
    )


def address_of(address: str | None) -> str:
    """Says which server is meant: the argument, else MOORAGE_SERVER, else the default."""
    return address or os.environ.get("MOORAGE_SERVER") or DEFAULT_ADDRESS


def seconds_of(timeout: Any) -> float | None:
    """Checks a timeout.

    Args:
        timeout: Seconds, or None for any time.

    Returns:
        The same; None for more than gRPC can count.

    Raises:
        InvalidRequest: It is no number.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, Real) or isinstance(timeout, bool) or math.isnan(timeout):
        raise InvalidRequest(f"timeout is {timeout!r:.40}; give seconds, or None for any time")
    return float(timeout) if timeout < _ENDLESS_SECONDS else None


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


class Resumption:
    """Decides when a call whose connection broke is made again; does no I/O.

    Args:
        breaks: How many breaks are put up with, however soon there is an answer again.
        now: A clock in seconds that does not go back.
        patience: Seconds since the connection broke in which the call is made again.
        answered: Whether the server is known to have answered before.
        broken: What says, with no reason of the server, that the connection broke.
    """

    def __init__(
        self,
        breaks: float,
        now: Callable[[], float],
        patience: float = PATIENCE,
        answered: bool = False,
        broken: tuple[type[Error], ...] = (Unavailable,),
    ) -> None:
        self._breaks_left = breaks
        self._now = now
        self._patience = patience
        self._answered = answered
        self._broken = broken
        self._broke: float | None = None
        self._next = FIRST_PAUSE

    def answered(self) -> None:
        """Notes that the server answers."""
        self._answered, self._broke, self._next = True, None, FIRST_PAUSE

    def pause(self, error: Error) -> float:
        """Decides what follows a failed call; a server that stops is as a broken connection.

        Args:
            error: Why it failed.

        Returns:
            Seconds to wait before the call is made again.

        Raises:
            Error: `error` itself, if the connection did not break after an answer, or broke too
                often or too long ago.
        """
        draining = error.reason == "SERVER_DRAINING" and error.retry_after is not None
        broken = draining or (isinstance(error, self._broken) and not error.reason)
        self._answered = self._answered or draining
        if self._broke is None:
            self._broke = self._now()
            self._breaks_left -= 1
        late = self._now() - self._broke >= self._patience
        if not broken or not self._answered or self._breaks_left < 0 or late:
            raise error
        seconds, self._next = self._next, min(2 * self._next, MAX_PAUSE)
        return seconds


class LoadWatch:
    """Follows one load over as many calls as it takes; does no I/O.

    Args:
        on_progress: Called with each progress.
        now: A clock in seconds that does not go back.

    Attributes:
        pause: Decides what follows a failed call, as `Resumption.pause`.
    """

    def __init__(
        self,
        on_progress: Callable[[LoadProgress], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_progress = on_progress
        self._resumption = Resumption(BREAKS, now)
        self.pause = self._resumption.pause

    def see(self, response: pb.LoadModelResponse) -> pb.LoadModelResponse | None:
        """Takes the next message.

        Args:
            response: Progress, or the model.

        Returns:
            The message if it has the model and the load is done, else None.
        """
        self._resumption.answered()
        if response.HasField("progress"):
            self._on_progress(decode.load_progress(response.progress))
        return response if response.HasField("model") else None

    def unfinished(self) -> Error:
        """Makes the error for a stream that ended well, but without the model."""
        return InternalError("the load ended without a model; call load() again")


class ModelWatch(Generic[T_co]):
    """Follows what becomes of models over as many calls as it takes; does no I/O.

    Args:
        client: Runs the forward passes of the models that are told of.
        now: A clock in seconds that does not go back.

    Attributes:
        pause: Decides what follows a failed call, as `Resumption.pause`.
    """

    def __init__(self, client: Scorer[T_co], now: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._models: dict[str, Model[T_co]] = {}
        self._seen = pb.WatchModelsRequest()
        self._resumption = Resumption(math.inf, now)
        self.pause = self._resumption.pause

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
        self._resumption.answered()
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

    def unfinished(self) -> Error:
        """Makes the error for a stream that ended well, as none should: the server is stopping."""
        return Unavailable("the server ended the watch; call watch() again")


def closed(address: str) -> Error:
    """Makes the error for a call on a closed client."""
    return FailedPrecondition(f"the client of {address} is closed; connect() again")
