"""Looks into sources: what a request stands for, before anything of it is fetched."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any

from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.monitor import LoadMonitor, Stage
from moorage_models.sources import ModelRequest, Policy
from moorage_server.limits import Limits
from moorage_server.tasks import begin, start

_OTHERS = 32  # threads that are left when one client has as many looks as it may


class Looks:
    """Looks in threads of their own, which count for their client until the end.

    Hubs may hang: one client's looks do not hold up those of others.
    """

    def __init__(self, policy: Policy, limits: Limits) -> None:
        """Makes one with nothing under way.

        Args:
            policy: What may be looked at.
            limits: What clients may have; a look counts as one of `client_models`.
        """
        self._policy = policy
        self._limits = limits
        self._threads = ThreadPoolExecutor(limits.client_models + _OTHERS, "look")
        self._counts: Counter[str | None] = Counter()  # that have not ended, by client
        self._shared: dict[ModelRequest, tuple[asyncio.Task[Checkpoint], LoadMonitor]] = {}

    async def look(self, request: ModelRequest, client: str) -> Checkpoint:
        """Looks into the source, and fetches nothing.

        Raises:
            ModelError: Whatever stands in the way of a load.
            ServerError: LIMIT_EXCEEDED.
        """
        return await asyncio.shield(begin(self._counted(request, client, fetch_tree=False)))

    async def resolve(self, request: ModelRequest, client: str | None = None) -> Checkpoint:
        """Looks for a load; callers that ask the same at the same time share one look.

        Args:
            request: What is asked for.
            client: Who asks; None for the server itself, which may look at any number of sources.

        Raises:
            ModelError: Whatever stands in the way of a load.
            ServerError: LIMIT_EXCEEDED.
        """
        if request not in self._shared:
            monitor = LoadMonitor()
            look = start(self._counted(request, client, monitor=monitor))
            self._shared[request] = (look, monitor)
            look.add_done_callback(lambda _: self._shared.pop(request))
        return await asyncio.shield(self._shared[request][0])

    def stages(self, request: ModelRequest) -> dict[str, Stage]:
        """What a look that is under way fetches: an Orbax tree, whose shapes are in its files."""
        return self._shared[request][1].stages() if request in self._shared else {}

    def stop(self) -> None:
        """Cancels what is being fetched."""
        for _, monitor in self._shared.values():
            monitor.cancel()

    def _counted(
        self, request: ModelRequest, client: str | None, **options: Any
    ) -> Coroutine[Any, Any, Checkpoint]:
        """A look that counts from now on, and has to be run."""
        if client is not None:
            self._limits.check("client_models", self._counts[client], what="looks into sources")
        self._counts[client] += 1
        return self._look(request, client, **options)

    async def _look(self, request: ModelRequest, client: str | None, **options: Any) -> Checkpoint:
        try:
            work = partial(copy_context().run, open_checkpoint, request, self._policy, **options)
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]
