"""The models that are loaded or being loaded. Everything here runs in one event loop."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.errors import ModelError
from moorage_models.errors import Reason as ModelReason
from moorage_models.monitor import LoadMonitor, Stage
from moorage_models.sources import ModelRequest, Policy
from moorage_server.admission import Admission
from moorage_server.budget import Budget
from moorage_server.changes import Changes
from moorage_server.device_thread import DeviceThread
from moorage_server.engine import Engine, Need
from moorage_server.errors import Reason, ServerError
from moorage_server.journal import Entry, Journal
from moorage_server.leases import Lease, LeaseTable
from moorage_server.lifecycle import State
from moorage_server.model import Model, Snapshot

_WATCH_SECONDS = 0.1
_PARALLEL_LOADS = 4

_log = logging.getLogger(__name__)


class ModelCache:
    """One load for all callers that ask for the same model, within the devices' memory.

    Attributes:
        device_thread: The one thread that runs on the devices, in order.
        budget: What the devices' memory is promised to.
        leases: Who keeps which model.
        changes: What became of models, for those who watch.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        now: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
    ) -> None:
        """Makes a cache without models.

        Args:
            engine: What owns the mesh.
            policy: What may be read.
            now: The clock of the leases, in seconds.
            journal: Where is kept what is loaded; nowhere if None.
        """
        self._engine = engine
        self._policy = policy
        self.budget = Budget(engine.info().device_bytes)
        self.leases = LeaseTable(now)
        self.changes: Changes[Snapshot] = Changes()
        self._journal = journal
        self._restoring: dict[str, asyncio.Task[None]] = {}
        self._restored: list[Entry] = []
        self._admission = Admission(engine, self.budget, self.leases, self.models, self._let_go)
        self._turns = asyncio.Semaphore(_PARALLEL_LOADS)
        self._resolving: dict[ModelRequest, tuple[asyncio.Task[Checkpoint], LoadMonitor]] = {}
        self._models: dict[str, Model] = {}
        self._load_threads = ThreadPoolExecutor(_PARALLEL_LOADS, "load")
        self.device_thread = DeviceThread()

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

    def join(self, request: ModelRequest, *, abandonable: bool = False) -> asyncio.Task[Model]:
        """Joins the load of a model, or starts it if nobody has asked for it yet.

        Args:
            request: What is wanted.
            abandonable: Whether the load may end once everybody has left who watches it.

        Returns:
            A task that gives the model, loaded or not, or raises whatever stands in the way of a
            load. It is not the caller's to cancel: wait for it, or shield it. Its caller counts as
            one who waits, and has to `watch` the model, or else to `leave`.
        """
        task = asyncio.create_task(self._joined(request, abandonable))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    def leave(self, join: asyncio.Task[Model]) -> None:
        """Ends a join, over or not, whose caller goes before it watches the model."""

        def left(join: asyncio.Task[Model]) -> None:
            if not join.cancelled() and not join.exception():
                self._left(join.result())

        join.add_done_callback(left)

    async def watch(self, model: Model) -> AsyncGenerator[None, None]:
        """Yields whenever progress may have changed, until the model that was joined is ready.

        Leaving early leaves the load running, unless all who watched it want otherwise.

        Raises:
            ModelError: The load failed or was cancelled.
        """
        assert model.load
        try:
            while not model.load.done():
                yield
                await asyncio.wait([model.load], timeout=_WATCH_SECONDS)
            model.load.result()
        finally:
            self._left(model)

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

    def restore(self) -> None:
        """Starts to load what the journal says was loaded, and takes over the leases.

        A model whose files have changed since has another handle; its leases end.
        """
        assert self._journal
        entries, leases = self._journal.read(self.leases.now())
        for lease in leases:
            self.leases.restore(lease)
        self._restored = entries
        for entry in entries:
            task = asyncio.create_task(self._restore(entry))
            self._restoring[entry.handle] = task
            task.add_done_callback(_retrieve)

    @property
    def is_restoring(self) -> bool:
        """Whether models of the server before this one are still to come."""
        return bool(self._restoring)

    async def when_ready(self, handle: str) -> Model:
        """A model that can be run; waits for one that is being restored.

        Raises:
            ServerError: MODEL_NOT_LOADED.
        """
        if task := self._restoring.get(handle):
            await asyncio.wait([task])
        return self.ready(handle)

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

    async def unload(self, handle: str, lease_id: str = "", force: bool = False) -> dict[int, int]:
        """Frees a model once its running forward passes have ended; cancels a running load.

        Callers share one unloading, which goes on if they leave.

        Args:
            handle: The model.
            lease_id: The caller's own lease, which does not stand in the way.
            force: Whether others' leases do not, either.

        Returns:
            Bytes that came back, by device id.

        Raises:
            ServerError: MODEL_NOT_LOADED; MODEL_LEASED.
        """
        model = self.get(handle)
        others = [lease for lease in self.leases.of(handle) if lease.id != lease_id]
        if others and not force:
            holders = ", ".join(map(self.leases.describe, others))
            raise ServerError(
                Reason.MODEL_LEASED,
                f"model {handle} is leased by {holders}; wait for that, or unload it by force",
            )
        return await asyncio.shield(self._let_go(model))

    def lease(self, model: Model, client: str, seconds: float) -> Lease:
        """Gives a client a lease on a model that is ready.

        Raises:
            ServerError: MODEL_NOT_LOADED; INVALID_REQUEST.
        """
        lease = self.leases.take(self.ready(model.handle).handle, client, seconds)
        self._changed(model)
        return lease

    def renew(self, lease_id: str) -> Lease:
        """Lets a lease last its whole duration again.

        Raises:
            ServerError: LEASE_UNKNOWN.
        """
        lease = self.leases.renew(lease_id)
        self._keep()
        return lease

    def release(self, lease_id: str) -> None:
        """Ends a lease.

        Raises:
            ServerError: LEASE_UNKNOWN.
        """
        handle = self.leases.release(lease_id).handle
        if model := self._models.get(handle):
            self._changed(model)

    def expire(self) -> None:
        """Tells those who watch of leases that have ended by themselves."""
        for handle in self.leases.take_expired():
            if model := self._models.get(handle):
                self._changed(model)

    def snapshot(self, model: Model) -> Snapshot:
        """A model as it is now, with what is promised to it and of it."""
        leases = tuple(self.leases.of(model.handle))
        return Snapshot.of(model, leases, self.budget.promised(model.handle))

    def estimate(self, need: Need) -> list[str] | None:
        """The handles of the models that would be evicted for another; None if it cannot fit."""
        return self.budget.victims(need, self._admission.evictable())

    def stop(self) -> None:
        """Cancels what is being loaded or fetched, for the process is about to end."""
        looks = [monitor for _, monitor in self._resolving.values()]
        for monitor in looks + [model.monitor for model in self.models()]:
            monitor.cancel()

    async def _joined(self, request: ModelRequest, abandonable: bool) -> Model:
        model = await self._join(request, abandonable)
        model.waiters += 1
        return model

    def _left(self, model: Model) -> None:
        """Takes note that somebody waits no longer."""
        assert model.load
        model.waiters -= 1
        if model.abandonable and not model.waiters and not model.load.done():
            self._let_go(model)

    async def _join(self, request: ModelRequest, abandonable: bool) -> Model:
        checkpoint = await self.resolve(request)
        handle = handle_of(checkpoint, self._engine.info().mesh)
        while (model := self._models.get(handle)) and model.unload:
            await asyncio.wait([model.unload])
        if model is None:
            model = self._models[handle] = Model(handle, checkpoint, self._changed)
            self._changed(model)
            model.load = asyncio.create_task(self._load(model))
            model.load.add_done_callback(_retrieve)
        model.abandonable = model.abandonable and abandonable
        return model

    async def _load(self, model: Model) -> None:
        begin = time.monotonic()
        try:
            async with self._turns:
                await self._admission.admit(model)
                model.enter(State.LOADING)
                model.device_bytes = await asyncio.get_running_loop().run_in_executor(
                    self._load_threads,
                    self._engine.load,
                    model.handle,
                    model.checkpoint,
                    model.monitor,
                )
            model.enter(State.READY)
            if model.unload:  # asked for too late to stop the load
                model.enter(State.DRAINING)
        except BaseException as error:
            self._forget(model, _end_of(error))
            if isinstance(error, asyncio.CancelledError) and model.unload:
                model.monitor.check()  # says so to those who watch
            raise
        finally:
            model.load_seconds = time.monotonic() - begin

    def _changed(self, model: Model) -> None:
        self.changes.add(self.snapshot(model))
        self._keep()

    def _keep(self) -> None:
        """Writes the journal: what is ready, and what is still to be restored."""
        if self._journal:
            ready = [Entry(m.handle, _pinned(m)) for m in self.models() if m.state is State.READY]
            waiting = [e for e in self._restored if e.handle in self._restoring]
            self._journal.write([*waiting, *ready], self.leases.all(), self.leases.now())

    async def _restore(self, entry: Entry) -> None:
        try:
            model = await self._join(entry.request, abandonable=False)
            if model.handle != entry.handle:
                _log.warning("%s is not what it was: its handle was %s", model.handle, entry.handle)
                self.leases.drop(entry.handle)
            assert model.load
            await asyncio.wait([model.load])
        finally:
            del self._restoring[entry.handle]
            self._keep()

    def _let_go(self, model: Model) -> asyncio.Task[dict[int, int]]:
        """Starts to unload a model, or joins that."""
        if model.unload is None:
            if model.state is State.READY:  # at once: nobody may lease or run it from here on
                model.enter(State.DRAINING)
            model.unload = asyncio.create_task(self._unload(model))
            model.unload.add_done_callback(_retrieve)
        return model.unload

    async def _unload(self, model: Model) -> dict[int, int]:
        assert model.load
        if not model.load.done():
            model.monitor.cancel()
            if model.state is State.QUEUED:
                model.load.cancel()
            await asyncio.wait([model.load])
        if model.state is not State.DRAINING:  # nothing is left of a load that failed
            return {}
        await model.idle()
        try:
            # On the device thread, so that an abandoned forward pass ends first.
            return await self.device_thread.run(self._engine.unload, model.handle)
        finally:
            self._forget(model, State.UNLOADED)

    def _forget(self, model: Model, end: State) -> None:
        """Gives back all that a model holds."""
        del self._models[model.handle]
        self.budget.release(model.handle)
        self.leases.drop(model.handle)
        model.enter(end)


def _end_of(error: BaseException) -> State:
    cancelled = isinstance(error, asyncio.CancelledError) or (
        isinstance(error, ModelError) and error.reason is ModelReason.LOAD_CANCELLED
    )
    return State.CANCELLED if cancelled else State.FAILED


def _pinned(model: Model) -> ModelRequest:
    """What was asked for, at the revision that it stood for."""
    checkpoint = model.checkpoint
    return replace(checkpoint.request, revision=checkpoint.repository.revision)


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
