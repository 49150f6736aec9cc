"""The models that are loaded or being loaded. Everything here runs in one event loop."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.monitor import LoadMonitor, Stage
from moorage_models.sources import ModelRequest, Policy
from moorage_server.engine import Engine
from moorage_server.errors import Reason, ServerError

_WATCH_SECONDS = 0.1
_PARALLEL_LOADS = 4

_log = logging.getLogger(__name__)


class State(StrEnum):
    """How far a model has come; names as in the wire's `ModelState`."""

    RESOLVING = "RESOLVING"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"


@dataclass
class Model:
    """A model that is loaded or being loaded.

    Attributes:
        handle: Its name in calls.
        checkpoint: What it is.
        state: How far it has come.
        monitor: Progress of its load.
        device_bytes: Bytes of parameters by device id, once placed.
        started: When its load began, in seconds since the epoch.
        load_seconds: How long the load took, once it is over.
        last_use: When the last forward pass ended, or 0.
        forwards: Forward passes served.
        tokens: Tokens scored.
        waiters: Callers that watch the load.
        in_use: Forward passes that run or wait.
        load: The task of its load.
        unload: The task that frees it, once that was asked for.
    """

    handle: str
    checkpoint: Checkpoint
    state: State = State.LOADING
    monitor: LoadMonitor = field(default_factory=LoadMonitor)
    device_bytes: dict[int, int] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    load_seconds: float = 0.0
    last_use: float = 0.0
    forwards: int = 0
    tokens: int = 0
    waiters: int = 0
    in_use: int = 0
    load: asyncio.Task[None] | None = None
    unload: asyncio.Task[dict[int, int]] | None = None
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def use(self, tokens: int) -> Iterator[None]:
        """Keeps the model from being unloaded while a forward pass runs."""
        self.in_use += 1
        self._idle.clear()
        try:
            yield
            self.forwards += 1
            self.tokens += tokens
        finally:
            self.last_use = time.time()
            self.in_use -= 1
            if self.in_use == 0:
                self._idle.set()

    async def idle(self) -> None:
        """Returns once no forward pass runs."""
        while self.in_use:
            await self._idle.wait()


class ModelCache:
    """One load for all callers that ask for the same model.

    Attributes:
        device_thread: The one thread that runs on the devices, in order.
    """

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self._engine = engine
        self._policy = policy
        self._resolving: dict[ModelRequest, tuple[asyncio.Task[Checkpoint], LoadMonitor]] = {}
        self._models: dict[str, Model] = {}
        self._load_threads = ThreadPoolExecutor(_PARALLEL_LOADS, "load")
        self.device_thread = ThreadPoolExecutor(1, "device")

    async def look(self, request: ModelRequest) -> Checkpoint:
        """Looks into the source, and fetches nothing.

        Raises:
            ModelError: Whatever stands in the way of a load.
        """
        return await asyncio.to_thread(open_checkpoint, request, self._policy, fetch_tree=False)

    async def resolve(self, request: ModelRequest) -> Checkpoint:
        """Looks into the source; callers that ask the same at the same time share one look.

        Raises:
            ModelError: Whatever stands in the way of a load.
        """
        if request not in self._resolving:
            monitor = LoadMonitor()
            look = asyncio.to_thread(open_checkpoint, request, self._policy, monitor=monitor)
            task = asyncio.create_task(look)
            self._resolving[request] = (task, monitor)
            task.add_done_callback(lambda _: self._resolving.pop(request))
            task.add_done_callback(_retrieve)
        return await asyncio.shield(self._resolving[request][0])

    def resolving(self, request: ModelRequest) -> dict[str, Stage]:
        """What a look that is under way fetches: an Orbax tree, whose shapes are in its files."""
        return self._resolving[request][1].stages() if request in self._resolving else {}

    def join(self, request: ModelRequest) -> asyncio.Task[Model]:
        """Joins the load of a model, or starts it if nobody has asked for it yet.

        Returns:
            A task that gives the model, loaded or not, or raises whatever stands in the way of a
            load. It is not the caller's to cancel: wait for it, or shield it.
        """
        task = asyncio.create_task(self._join(request))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    async def watch(self, model: Model) -> AsyncIterator[None]:
        """Yields whenever progress may have changed, until the model is ready.

        Leaving early leaves the load running.

        Raises:
            ModelError: The load failed or was cancelled.
        """
        assert model.load
        model.waiters += 1
        try:
            while not model.load.done():
                yield
                await asyncio.wait([model.load], timeout=_WATCH_SECONDS)
            model.load.result()
        finally:
            model.waiters -= 1

    def models(self) -> list[Model]:
        """Every model, oldest first."""
        return list(self._models.values())

    def get(self, handle: str) -> Model:
        """A model by its handle.

        Raises:
            ServerError: MODEL_NOT_LOADED.
        """
        if model := self._models.get(handle):
            return model
        loaded = ", ".join(f"{m.handle} ({m.checkpoint.request.model_id})" for m in self.models())
        raise ServerError(
            Reason.MODEL_NOT_LOADED,
            f"no model has handle {handle!r}; loaded are: {loaded or 'none'}. Load it again: the "
            "same request gives the same handle",
        )

    def ready(self, handle: str) -> Model:
        """A model that can be run.

        Raises:
            ServerError: MODEL_NOT_LOADED.
        """
        model = self.get(handle)
        if model.state is not State.READY:
            raise ServerError(
                Reason.MODEL_NOT_LOADED,
                f"model {handle} is {model.state}; LoadModel waits until it is ready",
            )
        return model

    async def unload(self, handle: str) -> dict[int, int]:
        """Frees a model once its running forward passes have ended; cancels a running load.

        Callers share one unloading, which goes on if they leave.

        Returns:
            Bytes that came back, by device id.

        Raises:
            ServerError: MODEL_NOT_LOADED.
        """
        model = self.get(handle)
        if model.unload is None:
            model.unload = asyncio.create_task(self._unload(model))
            model.unload.add_done_callback(_retrieve)
        return await asyncio.shield(model.unload)

    def stop(self) -> None:
        """Cancels what is being loaded or fetched, for the process is about to end."""
        looks = [monitor for _, monitor in self._resolving.values()]
        for monitor in looks + [model.monitor for model in self.models()]:
            monitor.cancel()

    async def _join(self, request: ModelRequest) -> Model:
        checkpoint = await self.resolve(request)
        handle = handle_of(checkpoint, self._engine.info().mesh)
        while (model := self._models.get(handle)) and model.unload:
            await asyncio.wait([model.unload])
        if model is None:
            model = self._models[handle] = Model(handle, checkpoint)
            model.load = asyncio.create_task(self._load(model))
            model.load.add_done_callback(_retrieve)
        return model

    async def _unload(self, model: Model) -> dict[int, int]:
        if model.load and not model.load.done():
            model.monitor.cancel()
            await asyncio.wait([model.load])
        if model.state is not State.READY:  # nothing is left of a load that failed
            return {}
        model.state = State.DRAINING
        await model.idle()
        loop = asyncio.get_running_loop()
        try:
            # On the device thread, so that an abandoned forward pass ends first.
            return await loop.run_in_executor(self.device_thread, self._engine.unload, model.handle)
        finally:
            del self._models[model.handle]

    async def _load(self, model: Model) -> None:
        begin = time.monotonic()
        try:
            model.device_bytes = await asyncio.get_running_loop().run_in_executor(
                self._load_threads, self._engine.load, model.handle, model.checkpoint, model.monitor
            )
            model.state = State.READY
        except BaseException:
            del self._models[model.handle]
            raise
        finally:
            model.load_seconds = time.monotonic() - begin


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Takes note of a failure that no caller may be there to see."""
    if not task.cancelled() and (error := task.exception()):
        _log.warning("%s", error)


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
