"""Who may take device memory: in the order of asking, and who has to go for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from moorage_server.budget import Budget
from moorage_server.engine import Engine, Need
from moorage_server.errors import Reason, ServerError
from moorage_server.leases import LeaseTable
from moorage_server.model import Model

_log = logging.getLogger(__name__)


class Admission:
    """Reserves memory for models, one after another, and evicts others if need be."""

    def __init__(
        self,
        engine: Engine,
        budget: Budget,
        leases: LeaseTable,
        models: Callable[[], Sequence[Model]],
        let_go: Callable[[Model], asyncio.Task[dict[int, int]]],
    ) -> None:
        """Makes the one admission of a cache.

        Args:
            engine: Says what a model needs.
            budget: What is promised.
            leases: Who keeps which model.
            models: Gives every model.
            let_go: Starts to unload a model, or joins that.
        """
        self._engine = engine
        self._budget = budget
        self._leases = leases
        self._models = models
        self._let_go = let_go
        self._lock = asyncio.Lock()

    async def admit(self, model: Model) -> None:
        """Reserves memory for a model, once there is enough.

        Raises:
            ServerError: DEVICE_BUDGET_EXCEEDED.
        """
        checkpoint = model.checkpoint
        need = self._engine.need(checkpoint.plan, checkpoint.compute_dtype)
        async with self._lock:
            while not self._budget.fits(need):
                leaving = {m.handle: m.unload for m in self._models() if m.unload}
                if not self._budget.fits(need, leaving):
                    victims = self._budget.victims(need, self.evictable(), leaving)
                    if victims is None:
                        raise self._refused(model, need)
                    for victim in [m for m in self._models() if m.handle in victims]:
                        _log.info("evicting %s for %s", victim.handle, model.handle)
                        leaving[victim.handle] = self._let_go(victim)
                await asyncio.wait(leaving.values(), return_when=asyncio.FIRST_COMPLETED)
            self._budget.reserve(model.handle, need)

    def evictable(self) -> list[str]:
        """Models that nobody leases, runs or waits for, the least recently used first."""
        idle = [m for m in self._models() if m.is_idle and not self._leases.of(m.handle)]
        return [model.handle for model in sorted(idle, key=lambda model: model.last_wanted)]

    def _refused(self, model: Model, need: Need) -> ServerError:
        budget, leases = self._budget, self._leases.all()
        wanted = need.weights + need.temporaries
        free = budget.capacity - budget.reserved()
        leased = sum(budget.weights(handle) for handle in {lease.handle for lease in leases})
        by = f" by {', '.join(map(self._leases.describe, leases))}" if leases else ""
        hint = "what else is loaded is in use. Unload a model, or wait for a lease to end"
        if wanted > budget.capacity:
            hint = "split the model over more devices, or give models more (--device-memory)"
        return ServerError(
            Reason.DEVICE_BUDGET_EXCEEDED,
            f"{model.checkpoint.request.model_id} needs {wanted} bytes on each device, "
            f"{need.weights} of them for its weights; of {budget.capacity} that models may take "
            f"{free} are free, and {leased} are leased{by}; {hint}",
            needed_bytes=str(wanted),
            free_bytes=str(free),
            leased_bytes=str(leased),
        )
