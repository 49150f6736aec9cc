"""The models that are loaded or being loaded. Everything here runs in one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from moorage_models.sources import ModelRequest, Policy
from moorage_server.activity import Activity
from moorage_server.changes import Changes
from moorage_server.engine import Engine, Need
from moorage_server.errors import Reason, ServerError
from moorage_server.journal import Journal
from moorage_server.leases import Lease, LeaseTable
from moorage_server.lifecycle import State
from moorage_server.limits import Limits
from moorage_server.loader import Loader
from moorage_server.looks import Looks
from moorage_server.model import Model, Snapshot, handle_of
from moorage_server.restoring import Restoration
from moorage_server.tasks import begin

_WATCH_SECONDS = 0.1


class ModelCache:
    """One load for all callers that ask for the same model, within the devices' memory.

    Attributes:
        mesh: Sizes of the mesh's axes, outermost first.
        device_thread: The one thread that runs on the devices, in order.
        budget: What the devices' memory is promised to.
        leases: Who keeps which model.
        changes: What became of models, for those who watch.
        limits: What clients may have.
        activity: What has been done.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        now: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
        *,
        limits: Limits | None = None,
    ) -> None:
        """Makes a cache without models.

        Args:
            engine: What owns the mesh.
            policy: What may be read.
            now: The clock of the leases, in seconds.
            journal: Where is kept what is loaded; nowhere if None.
            limits: What clients may have.
        """
        self.limits = limits or Limits()
        self.activity = Activity()
        self.looks = Looks(policy, self.limits)
        self.mesh = engine.info().mesh
        self.leases = LeaseTable(now)
        self._loader = Loader(engine, self.leases, self._changed, self.activity)
        self._restoration = Restoration(
            journal, self.leases, self.models, lambda request: self._join(request, client=None)
        )
        self.budget = self._loader.budget
        self.changes: Changes[Snapshot] = Changes()
        self.device_thread = self._loader.device_thread

    def join(
        self, request: ModelRequest, *, abandonable: bool = False, client: str = ""
    ) -> asyncio.Task[Model]:
        """Joins the load of a model, or starts it if nobody has asked for it yet.

        Args:
            request: What is wanted.
            abandonable: Whether the load may end once everybody has left who watches it.
            client: Who asks.

        Returns:
            A task that gives the model, loaded or not, or raises whatever stands in the way of a
            load. It is not the caller's to cancel: wait for it, or shield it. Its caller counts as
            one who waits, and has to `watch` the model, or else to `leave`.
        """
        return begin(self._joined(request, abandonable, client))

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
        return list(self._loader.models.values())

    def get(self, handle: str) -> Model:
        """A model by its handle.

        Raises:
            ServerError: MODEL_NOT_LOADED.
        """
        if model := self._loader.models.get(handle):
            return model
        loaded = ", ".join(f"{m.handle} ({m.checkpoint.request.model_id})" for m in self.models())
        raise ServerError(
            Reason.MODEL_NOT_LOADED,
            f"no model has handle {handle!r}; loaded are: {loaded or 'none'}. Load it again: the "
            "same request gives the same handle",
        )

    def restore(self) -> None:
        """Starts to load what the journal says was loaded, and takes over the leases."""
        self._restoration.begin()

    def preload(self, requests: Sequence[ModelRequest]) -> None:
        """Starts to load models before anybody has asked for them."""
        self._restoration.preload(requests)

    @property
    def is_restoring(self) -> bool:
        """Whether models are still to come, of the server before this one or to be preloaded."""
        return self._restoration.is_running

    async def restored(self, handle: str, seconds: float | None = None) -> bool:
        """Waits for a model if it is being restored; see `Restoration.wait`."""
        return await self._restoration.wait(handle, seconds)

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
        return await asyncio.shield(self._loader.let_go(model))

    def lease(self, model: Model, client: str, seconds: float, holder: str = "") -> Lease:
        """Gives a client a lease on a model that is ready.

        Args:
            model: The model.
            client: Who holds it, as the client calls itself.
            seconds: How long it lasts unless it is renewed.
            holder: Who holds it, as the server knows callers.

        Raises:
            ServerError: MODEL_NOT_LOADED; INVALID_REQUEST; LIMIT_EXCEEDED.
        """
        ready, leases = self.ready(model.handle), self.leases.all()
        self.limits.check("leases", len(leases))
        self.limits.check("client_leases", sum(lease.holder == holder for lease in leases))
        lease = self.leases.take(ready.handle, client, seconds, holder)
        self._changed(model)
        return lease

    def renew(self, lease_id: str) -> Lease:
        """Lets a lease last its whole duration again.

        Raises:
            ServerError: LEASE_UNKNOWN.
        """
        lease = self.leases.renew(lease_id)
        self._restoration.changed()
        return lease

    def release(self, lease_id: str) -> None:
        """Ends a lease.

        Raises:
            ServerError: LEASE_UNKNOWN.
        """
        handle = self.leases.release(lease_id).handle
        if model := self._loader.models.get(handle):
            self._changed(model)
        self._restoration.changed()  # for a model that is still to be restored, too

    def expire(self) -> None:
        """Tells those who watch of leases that have ended by themselves."""
        for handle in self.leases.take_expired():
            if model := self._loader.models.get(handle):
                self._changed(model)

    def snapshot(self, model: Model) -> Snapshot:
        """A model as it is now, with what is promised to it and of it."""
        leases = tuple(self.leases.of(model.handle))
        return Snapshot.of(model, leases, self.budget.promised(model.handle))

    def estimate(self, need: Need) -> list[str] | None:
        """The handles of the models that would be evicted for another; None if it cannot fit."""
        return self.budget.victims(need, self._loader.admission.evictable())

    def stop(self) -> None:
        """Cancels what is being loaded or fetched, for the process is about to end."""
        self._restoration.stop()
        self.looks.stop()
        for model in self.models():
            model.monitor.cancel()

    async def _joined(self, request: ModelRequest, abandonable: bool, client: str) -> Model:
        model = await self._join(request, abandonable=abandonable, client=client)
        model.waiters += 1
        return model

    def _left(self, model: Model) -> None:
        """Takes note that somebody waits no longer."""
        assert model.load
        model.waiters -= 1
        if model.abandonable and not model.waiters and not model.load.done():
            self._loader.let_go(model)

    async def _join(
        self, request: ModelRequest, *, abandonable: bool = False, client: str | None
    ) -> Model:
        """Joins or starts a load; without a client, before those that clients ask for."""
        checkpoint = await self.looks.resolve(request, client)
        handle = handle_of(checkpoint, self.mesh)
        if client is not None and handle not in self._loader.models:
            await self._restoration.admitted()
        while (model := self._loader.models.get(handle)) and model.unload:
            await asyncio.wait([model.unload])
        if model is None:
            if client is not None:
                self._check_models(client)
            model = self._loader.load(handle, checkpoint, client or "")
        model.abandonable = model.abandonable and abandonable
        return model

    def _check_models(self, client: str) -> None:
        """Refuses a model that would be one too many.

        Raises:
            ServerError: LIMIT_EXCEEDED.
        """
        models = self._loader.models.values()
        self.limits.check("models", len(models))
        self.limits.check("client_models", sum(model.client == client for model in models))

    def _changed(self, model: Model) -> None:
        self.changes.add(self.snapshot(model))
        self._restoration.changed()
