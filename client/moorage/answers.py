"""Models and what becomes of them, as frozen dataclasses; `decode` makes them from messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Generic, Protocol, Unpack, cast

from moorage.naming import Config
from moorage.options import ForwardOptions
from moorage.rows import Rows
from moorage.scores import Scores

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    T_co = TypeVar("T_co", covariant=True, default=Scores)
else:  # Python 3.13 brings the default; before, only type checkers know of it
    from typing import TypeVar

    T_co = TypeVar("T_co", covariant=True)


UNITS = {"compile": "programs", "prove": "trials"}
"""What those stages of a load count that do not count bytes."""


@dataclass(frozen=True)
class Stage:
    """One stage of a load: "fetch" and "place" in bytes, others in `UNITS`.

    Attributes:
        done: How much is done.
        total: How much there is; 0 while that is unknown.
        rate: Units a second since the stage began.
    """

    done: int
    total: int
    rate: float

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at this rate; None while that cannot be told."""
        known = self.total and self.rate
        return max(self.total - self.done, 0) / self.rate if known else None


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is.

    Attributes:
        state: "queued", "resolving", "loading", ...
        stages: The stages that there are, by name.
        waiters: How many callers wait for this load.
        elapsed_seconds: Time since the load began.
    """

    state: str
    stages: Mapping[str, Stage]
    waiters: int
    elapsed_seconds: float


@dataclass(frozen=True)
class Tokenizer:
    """What a checkpoint says of its tokenizer.

    Attributes:
        files: The tokenizer's files, relative to the checkpoint.
        bos_id: The token that begins a sequence, or None.
        eos_ids: Every token that ends one; the configuration's own first.
        pad_id: The token that pads, or None.
        has_chat_template: Whether there is a chat template.
    """

    files: tuple[str, ...]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    has_chat_template: bool


@dataclass(frozen=True)
class Lease:
    """A client's hold on a model: while it lasts, others can neither evict nor unload it.

    Attributes:
        id: Names the lease; "" if another client holds it.
        client: Who holds it, as the client calls itself.
        seconds: How long it lasts unless it is renewed.
        seconds_left: How long it lasted yet when it was described.
    """

    id: str
    client: str
    seconds: float
    seconds_left: float


class Scorer(Protocol[T_co]):
    """What a model needs of its client; `T_co` is Scores, or a coroutine that gives it."""

    def lease(self, model: str) -> Lease | None:
        """Gives the lease that the client holds on the model with this handle."""
        ...

    def forward(
        self,
        model: str,
        rows: Rows,
        outputs: Iterable[str],
        segment_ids: Rows | None,
        **options: Unpack[ForwardOptions],
    ) -> T_co:
        """Runs a forward pass on the model with this handle."""
        ...


class FutureScorer(Scorer[Scores], Protocol):
    """A client for blocking code."""

    def forward_async(
        self,
        model: str,
        rows: Rows,
        outputs: Iterable[str],
        segment_ids: Rows | None,
        **options: Unpack[ForwardOptions],
    ) -> Future[Scores]:
        """Begins a forward pass on the model with this handle."""
        ...


@dataclass(frozen=True)
class Model(Generic[T_co]):
    """A model that the server holds or is loading, as it was when it was described.

    Attributes:
        handle: Names the model in later calls; the same after a restart of the server.
        state: "ready" once it serves.
        model_id: The id that was asked for.
        model_config_id: The configuration, for example "gemma2_2b_it".
        source: A key of `moorage.requests.SOURCES`.
        path: Where it was read from, as the source names it.
        revision: The resolved commit, version or digest.
        config: The numbers of the decoder.
        dtype: The dtype of the parameters.
        compute_dtype: The dtype of the arithmetic.
        device_bytes: Bytes of parameters by device id.
        load_time: When the load began, or None.
        load_seconds: How long the load took.
        last_use_time: When the last forward pass ended, or None.
        forward_count: Forward passes served.
        token_count: Tokens scored.
        progress: How far the load is, or None once it is ready.
        preset_differences: Where the checkpoint's config.json differs from the preset.
        tokenizer: What the checkpoint says of its tokenizer.
        leases: All clients' leases on it, without their ids.
        history: When each state began, in order.
        running_count: Forward passes that run or wait.
        reserved_bytes: What is reserved for it on each device.
        requested_by: Who asked for it first: the name of a token, or a connection.
        buckets: The shapes (rows, length) that it runs in, once they were tried.
    """

    handle: str
    state: str
    model_id: str
    model_config_id: str
    source: str
    path: str
    revision: str
    config: Config
    dtype: str
    compute_dtype: str
    device_bytes: Mapping[int, int]
    load_time: datetime | None
    load_seconds: float
    last_use_time: datetime | None
    forward_count: int
    token_count: int
    progress: LoadProgress | None
    preset_differences: tuple[str, ...]
    tokenizer: Tokenizer
    leases: tuple[Lease, ...]
    history: Mapping[str, datetime]
    running_count: int
    reserved_bytes: int
    requested_by: str
    buckets: tuple[tuple[int, int], ...]
    client: Scorer[T_co] = field(repr=False, compare=False)

    @property
    def lease(self) -> Lease | None:
        """The lease that this client holds on the model now, or None."""
        return self.client.lease(self.handle)

    def forward(
        self,
        rows: Rows,
        outputs: Iterable[str] = ("logprobs",),
        segment_ids: Rows | None = None,
        **options: Unpack[ForwardOptions],
    ) -> T_co:
        """Runs a forward pass.

        Rows that do not fit into one request, or their values into one answer, are sent in several,
        and the answers put together.
        If the connection breaks, the pass goes on in the server and the call comes back for what
        is missing; where too much work waits, it tries again when the server says so.

        Args:
            rows: Ragged rows of token ids: lists or integer arrays, or one array [rows, length].
            outputs: Names of outputs, as `ServerInfo.outputs` lists them.
            segment_ids: Shaped as `rows`. Tokens of a row see each other only within a segment;
                segments count from 1 and are contiguous. None: each row is one segment.
            **options: See `moorage.ForwardOptions`.

        Returns:
            The scores; from an asyncio client, a coroutine that gives them.

        Raises:
            InvalidRequest: The rows are wrong; raised before anything is sent where possible.
            MessageTooLarge: One row alone does not fit into a request.
            FailedPrecondition: An output is not served, or the model's weights are not those that
                were expected, or changed in between.
            ResourceExhausted: Too much work waited until the time was over.
            DataLoss: Bytes of the answer are damaged or missing.
            Error: Any other failure.
        """
        return self.client.forward(self.handle, rows, outputs, segment_ids, **options)

    def forward_async(
        self: Model[Scores],
        rows: Rows,
        outputs: Iterable[str] = ("logprobs",),
        segment_ids: Rows | None = None,
        **options: Unpack[ForwardOptions],
    ) -> Future[Scores]:
        """Begins a forward pass; of a blocking client only, as asyncio's `forward` is awaited.

        Args:
            rows: As in `forward`, as are all arguments.
            outputs: Names of outputs.
            segment_ids: Shaped as `rows`, or None.
            **options: See `moorage.ForwardOptions`; the time of `timeout` begins with the call.

        Returns:
            A future of the scores. Its `cancel` ends the call, be it waiting or running.

        Raises:
            InvalidRequest: The rows are wrong; every other failure is the future's.
            MessageTooLarge: One row alone does not fit into a request.
        """
        client = cast(FutureScorer, self.client)
        return client.forward_async(self.handle, rows, outputs, segment_ids, **options)


@dataclass(frozen=True)
class Change(Generic[T_co]):
    """What `watch` tells: what has changed, and how all models are since.

    Attributes:
        sequence: The number of the change in this run of the server.
        model: The model that changed, as it was after this change; None if the server told of
            all models anew: at the beginning, after a restart, or if changes were missed.
        models: Every model that is loaded or being loaded, oldest first.
    """

    sequence: int
    model: Model[T_co] | None
    models: tuple[Model[T_co], ...]
