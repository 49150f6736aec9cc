"""Goes on from where the last server was: what it held is loaded again, and its leases hold."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from moorage_models.errors import ModelError
from moorage_models.sources import ModelRequest
from moorage_server.errors import ServerError
from moorage_server.journal import Entry, Journal
from moorage_server.leases import LeaseTable
from moorage_server.lifecycle import State
from moorage_server.model import Model
from moorage_server.tasks import start

_log = logging.getLogger(__name__)


class Restoration:
    """Keeps the journal, and loads again what that of the last server says was loaded."""

    def __init__(
        self,
        journal: Journal | None,
        leases: LeaseTable,
        models: Callable[[], Sequence[Model]],
        load: Callable[[ModelRequest], Awaitable[Model]],
    ) -> None:
        """Makes the one restoration of a cache.

        Args:
            journal: Where is kept what is loaded; nowhere if None.
            leases: Who keeps which model.
            models: Gives every model.
            load: Starts to load a model, or joins that.
        """
        self._journal = journal
        self._leases = leases
        self._models = models
        self._load = load
        self._waiting: dict[str, Entry] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._preloads: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Writes the journal: what is ready, what is still to come, and the leases."""
        self._changed.set()
        self._changed = asyncio.Event()
        if self._journal:
            ready = {m.handle: _entry(m) for m in self._models() if m.state is State.READY}
            entries = self._waiting | ready
            leases = [lease for lease in self._leases.all() if lease.handle in entries]
            self._journal.write(list(entries.values()), leases, self._leases.now())

    def stop(self) -> None:
        """Writes the journal for the last time: what ends now is for the next server to load."""
        self.changed()
        self._journal = None

    def begin(self) -> None:
        """Starts to load what the journal says was loaded, and takes over the leases.

        A model whose files have changed since has another handle; its leases end.
        """
        assert self._journal
        entries, leases = self._journal.read(self._leases.now())
        for lease in leases:
            self._leases.restore(lease)
        self._waiting = {entry.handle: entry for entry in entries}
        self._tasks = {entry.handle: start(self._restore(entry)) for entry in entries}

    def preload(self, requests: Sequence[ModelRequest]) -> None:
        """Starts to load models before anybody has asked for them."""
        for request in requests:
            task = start(self._preload(request))
            self._preloads.add(task)
            task.add_done_callback(self._preloads.discard)

    @property
    def is_running(self) -> bool:
        """Whether models of the last server, or of the list to preload, are still to come."""
        return bool(self._waiting or self._preloads)

    async def wait(self, handle: str, seconds: float | None = None) -> bool:
        """Waits until a model of the last server is ready, or will not be.

        Args:
            handle: The model; for any other it returns at once.
            seconds: How long at the most; None for any time.

        Returns:
            Whether there is nothing to wait for any more.
        """
        if handle in self._waiting:
            await asyncio.wait([self._tasks[handle]], timeout=seconds)
        return handle not in self._waiting

    async def admitted(self) -> None:
        """Returns once models of the last server have their memory again, or will not have it.

        All of them fit together, but not for certain beside others, and some are leased.
        """
        while self._waiting.keys() - {
            model.handle for model in self._models() if model.state is not State.QUEUED
        }:
            await self._changed.wait()

    async def _restore(self, entry: Entry) -> None:
        load = None
        try:
            model = await self._load(entry.request)
            if model.handle == entry.handle:
                load = model.load
            else:
                _log.warning("%s is not what it was: its handle was %s", model.handle, entry.handle)
            if load:
                await asyncio.wait([load])
        finally:
            del self._waiting[entry.handle]
            if load is None:
                self._leases.drop(entry.handle, unloaded=False)
            self.changed()

    async def _preload(self, request: ModelRequest) -> None:
        try:
            load = (await self._load(request)).load
            if load:
                await asyncio.wait([load])
                load.result()
        except (ModelError, ServerError) as error:
            _log.error("%s cannot be preloaded: %s", request.model_id, error)


def _entry(model: Model) -> Entry:
    """What was asked for, at the revision that it stood for."""
    checkpoint = model.checkpoint
    return Entry(model.handle, replace(checkpoint.request, revision=checkpoint.repository.revision))
