"""What the server says of itself, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Device:
    """One device of the server's mesh, and the bytes of parameters on it."""

    id: int
    kind: str
    model_bytes: int


@dataclass(frozen=True)
class ParameterLayout:
    """How one parameter of a model lies on the server's mesh.

    Attributes:
        name: Its name.
        shape: Its shape, the layers first where it has one for each.
        dtype: Its dtype.
        axes: For each axis of the shape the mesh axes that split it, the outer one first; none for
            one that each device holds whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[tuple[str, ...], ...]


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
class OutputProfile:
    """A program that models are served with.

    Attributes:
        outputs: The outputs that it gives.
        size: The largest top_k, or the largest number of candidates; 0 for neither.
    """

    outputs: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Limits:
    """How much there may be of everything; of `client_...`, for one client.

    Attributes:
        requests: Requests that are under way.
        client_requests: The same.
        client_tokens: Tokens that wait for the devices.
        connections: Connections that are open.
        models: Models that are loaded or on their way.
        client_models: Those that it asked for first.
        leases: Leases that have not ended.
        client_leases: The same.
    """

    requests: int
    client_requests: int
    client_tokens: int
    connections: int
    models: int
    client_models: int
    leases: int
    client_leases: int


@dataclass(frozen=True)
class RecentError:
    """A request that was refused or failed.

    Attributes:
        time: When.
        method: Which.
        reason: Why, as `Error.reason`.
        message: What its caller was told.
        request_id: Its id in the server's log.
        client: Who asked: the name of a token, or a connection.
    """

    time: datetime | None
    method: str
    reason: str
    message: str
    request_id: str
    client: str


@dataclass(frozen=True)
class Activity:
    """What the server does now, and what it has done since it started.

    Attributes:
        requests: Requests of every kind that are under way.
        forwards_under_way: Forward passes that wait for their answers, or take them.
        queued_tokens: Tokens that wait for the devices, padding included.
        leases: Leases that have not ended.
        forwards: Forward passes answered.
        tokens: Tokens of theirs.
        batches: Batches that ran.
        batch_tokens: Tokens in them, of rows that were asked for.
        batch_slots: Tokens in them, padding included.
        loads: How many loads ended in each state, or failed for each reason.
        refusals: How many requests were refused or failed, by reason.
        errors: The latest of those, the latest last.
    """

    requests: int
    forwards_under_way: int
    queued_tokens: int
    leases: int
    forwards: int
    tokens: int
    batches: int
    batch_tokens: int
    batch_slots: int
    loads: Mapping[str, int]
    refusals: Mapping[str, int]
    errors: tuple[RecentError, ...]


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
        max_queued_tokens: How many tokens may wait for the devices.
        answer_retention_seconds: How long an answer is kept for a caller that comes back for it.
        max_retained_bytes: How many bytes of answers are kept so, in all.
        max_waiting_bytes: How many bytes the requests may take that somebody waits for, in all.
        sources: Keys of `moorage.requests.SOURCES` that may be loaded from.
        outputs: The outputs that are served.
        start_time: When the server started, or None.
        memory: What is promised to models, and what is held.
        profiles: The programs that are compiled for every model before it is ready.
        compiles_after_ready: Programs that were compiled for a forward pass: none, ever.
        limits: How much clients may have.
        activity: What goes on.
    """

    version: str
    platform: str
    devices: tuple[Device, ...]
    mesh: Mapping[str, int]
    buckets: tuple[tuple[int, int], ...]
    max_message_bytes: int
    max_sequence_length: int
    max_output_bytes: int
    max_queued_tokens: int
    answer_retention_seconds: float
    max_retained_bytes: int
    max_waiting_bytes: int
    sources: tuple[str, ...]
    outputs: tuple[str, ...]
    start_time: datetime | None
    memory: Memory
    profiles: tuple[OutputProfile, ...]
    compiles_after_ready: int
    limits: Limits
    activity: Activity
