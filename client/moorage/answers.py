"""What the server says, as frozen dataclasses; `decode` makes them from the wire's messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Generic, Protocol

from moorage.requests import Rows
from moorage.scores import Scores

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    T_co = TypeVar("T_co", covariant=True, default=Scores)
else:  # Python 3.13 brings the default; before, only type checkers know of it
    from typing import TypeVar

    T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Config:
    """The numbers of a decoder, as the wire's ConfigSummary names them; a tied head counts once."""

    family: str
    num_layers: int
    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_parameters: int


@dataclass(frozen=True)
class BudgetEstimate:
    """Whether a model would fit beside those that are loaded.

    Attributes:
        needed_bytes: What it would reserve on each device: its parameters, and what its largest
            program takes while it runs.
        free_bytes: What nobody has reserved on each device.
        fits: Whether it could be loaded now, after evictions if need be.
        evicted: The handles of the models that would be evicted for it.
    """

    needed_bytes: int
    free_bytes: int
    fits: bool
    evicted: tuple[str, ...]


@dataclass(frozen=True)
class Resolution:
    """What a name means; a naming attribute that no rule can give is "".

    Attributes:
        checked: What was checked, in order: "name", "preset", "source", "config", "headers".
        loadable: Whether nothing that was checked stands in the way of a load.
        reason: Why not, as in `Error.reason`, or "".
        message: Why not, and what would work, or "".
        config: From the checkpoint or the preset; None if neither is known.
        revision: The resolved commit, version or digest; "" if no source was looked into.
        device_bytes: Bytes by device id; empty unless asked for.
        preset_differences: Where the checkpoint's config.json differs from the preset.
        budget: What a load would find in device memory; None unless asked for.
    """

    model_id: str
    model_name: str
    model_family: str
    model_version: str
    model_config_category: str
    model_config_id: str
    checked: tuple[str, ...]
    loadable: bool
    reason: str
    message: str
    config: Config | None
    revision: str
    device_bytes: Mapping[int, int]
    preset_differences: tuple[str, ...]
    budget: BudgetEstimate | None


@dataclass(frozen=True)
class SupportedModel:
    """One preset: a config id that needs no config.json."""

    model_config_id: str
    model_config_category: str
    config: Config


@dataclass(frozen=True)
class Stage:
    """One stage of a load, in bytes ("fetch", "place") or programs ("compile").

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
        stages: The stages that run side by side, by name.
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
    """What a model needs of its client; `T_co` is Scores, or an awaitable of it."""

    def lease(self, model: str) -> Lease | None:
        """Gives the lease that the client holds on the model with this handle."""
        ...

    def forward(
        self, model: str, rows: Rows, outputs: Sequence[str], segment_ids: Rows | None
    ) -> T_co:
        """Runs a forward pass on the model with this handle."""
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
    client: Scorer[T_co] = field(repr=False, compare=False)

    @property
    def lease(self) -> Lease | None:
        """The lease that this client holds on the model now, or None."""
        return self.client.lease(self.handle)

    def forward(
        self,
        rows: Rows,
        outputs: Sequence[str] = ("logprobs",),
        segment_ids: Rows | None = None,
    ) -> T_co:
        """Runs a forward pass.

        Args:
            rows: Ragged rows of token ids: lists or integer arrays, or one array [rows, length].
            outputs: "logprobs", "logits" or both.
            segment_ids: Shaped as `rows`. Tokens of a row see each other only within a segment;
                segments count from 1 and are contiguous. None: each row is one segment.

        Returns:
            The scores; from an asyncio client, an awaitable of them.

        Raises:
            InvalidRequest: The rows are wrong; raised before anything is sent where possible.
            DataLoss: Bytes of the answer are damaged or missing.
            Error: Any other failure.
        """
        return self.client.forward(self.handle, rows, outputs, segment_ids)


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


@dataclass(frozen=True)
class Device:
    """One device of the server's mesh, and the bytes of parameters on it."""

    id: int
    kind: str
    model_bytes: int


@dataclass(frozen=True)
class Memory:
    """What is promised to models, and what is held.

    Attributes:
        budget_bytes: What models may take of each device.
        reserved_bytes: What is reserved for models on each device.
        live_bytes: Bytes of arrays that are alive, by device id.
        host_pool_bytes: Host memory that models have left behind, kept for those to come.
    """

    budget_bytes: int
    reserved_bytes: int
    live_bytes: Mapping[int, int]
    host_pool_bytes: int


@dataclass(frozen=True)
class ServerInfo:
    """What the server is and what it accepts.

    Attributes:
        version: The server's version.
        platform: "cpu" or "tpu".
        devices: The devices of the mesh.
        mesh: Size of each axis by name, outermost first.
        buckets: The compiled shapes (rows, length).
        max_message_bytes: The largest request.
        max_sequence_length: The longest row, in tokens.
        max_output_bytes: The largest answer.
        sources: Keys of `moorage.requests.SOURCES` that may be loaded from.
        outputs: The outputs that are served.
        start_time: When the server started, or None.
        memory: What is promised to models, and what is held.
    """

    version: str
    platform: str
    devices: tuple[Device, ...]
    mesh: Mapping[str, int]
    buckets: tuple[tuple[int, int], ...]
    max_message_bytes: int
    max_sequence_length: int
    max_output_bytes: int
    sources: tuple[str, ...]
    outputs: tuple[str, ...]
    start_time: datetime | None
    memory: Memory
