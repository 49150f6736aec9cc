"""A model of the server: what it is, how far it has come, and who uses it."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from moorage_models.checkpoint import Checkpoint
from moorage_models.monitor import LoadMonitor
from moorage_server.engine import Bucket
from moorage_server.leases import Lease
from moorage_server.lifecycle import NEXT, State

#: The version of a model's weights; weights are not updated yet.
WEIGHTS_VERSION = 1


@dataclass
class Model:
    """A model that is loaded or being loaded.

    Attributes:
        handle: Its name in calls.
        checkpoint: What it is.
        on_change: Is called after each change that others may see.
        state: How far it has come.
        history: When each state began, in seconds since the epoch.
        client: Who asked for it first; empty for one that was loaded again after a restart.
        monitor: Progress of its load.
        device_bytes: Bytes of parameters by device id, once placed.
        weights_digest: A digest of the weights, once placed.
        buckets: The shapes that it runs in, once that was tried.
        load_seconds: How long the load took, once it is over.
        last_use: When the last forward pass ended, or 0.
        forwards: Forward passes served.
        tokens: Tokens scored.
        waiters: Callers that watch the load.
        in_use: Forward passes that run or wait.
        abandonable: Every caller so far wants the load to end once all of them have left.
        load: The task of its load.
        unload: The task that frees it, once that was asked for.
    """

    handle: str
    checkpoint: Checkpoint
    on_change: Callable[[Model], None]
    state: State = State.QUEUED
    history: dict[State, float] = field(default_factory=dict)
    client: str = ""
    monitor: LoadMonitor = field(default_factory=LoadMonitor)
    device_bytes: dict[int, int] = field(default_factory=dict)
    weights_digest: str = ""
    buckets: tuple[Bucket, ...] = ()
    load_seconds: float = 0.0
    last_use: float = 0.0
    forwards: int = 0
    tokens: int = 0
    waiters: int = 0
    in_use: int = 0
    abandonable: bool = True
    load: asyncio.Task[None] | None = None
    unload: asyncio.Task[dict[int, int]] | None = None
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.history[self.state] = time.time()

    @property
    def started(self) -> float:
        """When its load was asked for, in seconds since the epoch."""
        return next(iter(self.history.values()))

    @property
    def last_wanted(self) -> float:
        """When it was last used, or became ready: the one for whom that is longest ago goes first.

        In seconds since the epoch.
        """
        return max(self.last_use, self.history.get(State.READY, 0.0))

    @property
    def is_idle(self) -> bool:
        """It is ready, and nobody runs it, waits for it or lets it go."""
        busy = self.in_use or self.waiters or self.unload
        return self.state is State.READY and not busy

    def enter(self, state: State) -> None:
        """Goes on to a state, which must be one that may follow."""
        assert state in NEXT[self.state], f"{self.state} is not followed by {state}"
        self.state = state
        self.history[state] = time.time()
        self.on_change(self)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keeps the model from being unloaded while a forward pass runs."""
        self.in_use += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.last_use = time.time()
            self.in_use -= 1
            if self.in_use == 0:
                self._idle.set()

    def answer(self, tokens: int) -> None:
        """Takes note of a forward pass that was answered."""
        self.forwards += 1
        self.tokens += tokens

    async def idle(self) -> None:
        """Returns once no forward pass runs."""
        while self.in_use:
            await self._idle.wait()


@dataclass(frozen=True)
class Snapshot:
    """A model as it was at one moment.

    Attributes:
        model: A copy that does not change.
        leases: The leases on it.
        reserved: Bytes on each device that are promised to it.
    """

    model: Model
    leases: tuple[Lease, ...]
    reserved: int

    @classmethod
    def of(cls, model: Model, leases: tuple[Lease, ...], reserved: int) -> Snapshot:
        """Takes a snapshot."""
        still = copy.copy(model)
        still.history = dict(model.history)
        still.load = still.unload = None  # a task that failed keeps all that its frames refer to
        return cls(still, leases, reserved)


def handle_of(checkpoint: Checkpoint, mesh: dict[str, int]) -> str:
    """A short hash of everything that decides a model's numbers and layout."""
    request, repository = checkpoint.request, checkpoint.repository
    fingerprint = (
        sorted(asdict(checkpoint.config).items(), key=lambda item: item[0]),
        request.source.value,
        request.options,
        repository.key,
        repository.revision,
        sorted((parameter.name, parameter.dtype) for parameter in checkpoint.plan.parameters),
        checkpoint.compute_dtype,
        sorted(mesh.items()),
    )
    return hashlib.sha256(repr(fingerprint).encode()).hexdigest()[:12]
