"""Brings models into the devices' memory and out of it. Everything here runs in one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from moorage_models.checkpoint import Checkpoint
from moorage_models.errors import ModelError
from moorage_models.errors import Reason as ModelReason
from moorage_server.activity import Activity
from moorage_server.admission import Admission
from moorage_server.budget import Budget
from moorage_server.device_thread import DeviceThread
from moorage_server.engine import Engine
from moorage_server.engine.agreement import agreeing, probes
from moorage_server.errors import ServerError
from moorage_server.leases import LeaseTable
from moorage_server.lifecycle import State
from moorage_server.model import Model
from moorage_server.tasks import start

_PARALLEL_LOADS = 4

_log = logging.getLogger(__name__)


class Loader:
    """Loads each model once, and frees it once.

    Attributes:
        models: The models that are there or on their way, by handle, oldest first.
        budget: What the devices' memory is promised to.
        admission: Who may take it.
        device_thread: The one thread that runs on the devices, in order.
    """

    def __init__(
        self,
        engine: Engine,
        leases: LeaseTable,
        on_change: Callable[[Model], None],
        activity: Activity,
    ) -> None:
        """Makes a loader without models.

        Args:
            engine: What owns the mesh.
            leases: Who keeps which model.
            on_change: Is called after each change of a model that others may see.
            activity: Where is counted what is done.
        """
        self._engine = engine
        self._leases = leases
        self._on_change = on_change
        self._activity = activity
        self._turns = asyncio.Semaphore(_PARALLEL_LOADS)
        self._threads = ThreadPoolExecutor(_PARALLEL_LOADS, "load")
        self.models: dict[str, Model] = {}
        self.budget = Budget(engine.info().device_bytes)
        self.admission = Admission(
            engine, self.budget, leases, lambda: list(self.models.values()), self.let_go
        )
        self.device_thread = DeviceThread()

    def load(self, handle: str, checkpoint: Checkpoint, client: str) -> Model:
        """Starts to load a model whose handle is free."""
        model = Model(handle, checkpoint, self._on_change, client=client)
        self.models[handle] = model
        self._on_change(model)
        model.load = start(self._load(model))
        return model

    def let_go(self, model: Model) -> asyncio.Task[dict[int, int]]:
        """Starts to unload a model, or joins that; cancels a load that runs.

        Returns:
            A task that gives the bytes that came back, by device id.
        """
        if model.unload is None:
            if model.state is State.READY:  # at once: nobody may lease or run it from here on
                model.enter(State.DRAINING)
            model.unload = start(self._unload(model))
        return model.unload

    async def _load(self, model: Model) -> None:
        begin = time.monotonic()
        try:
            async with self._turns:
                await self.admission.admit(model)
                model.enter(State.LOADING)
                await asyncio.get_running_loop().run_in_executor(self._threads, self._place, model)
            await self._prove(model)
            model.enter(State.READY)
            self._activity.end_load(model.monitor.stages(), time.monotonic() - begin)
            if model.unload:  # asked for too late to stop the load
                model.enter(State.DRAINING)
        except BaseException as error:
            end = _end_of(error)
            self._forget(model, end)
            self._activity.loads[_name_of(error) if end is State.FAILED else end] += 1
            if isinstance(error, asyncio.CancelledError) and model.unload:
                model.monitor.check()  # says so to those who watch
            raise
        finally:
            model.load_seconds = time.monotonic() - begin

    def _place(self, model: Model) -> None:
        """Runs on a thread of its own."""
        checkpoint = model.checkpoint
        model.device_bytes = self._engine.load(model.handle, checkpoint, model.monitor)
        try:
            model.weights_digest = checkpoint.weights_digest  # after: a load may read all to tell
        except BaseException:
            self._engine.unload(model.handle)
            raise

    async def _prove(self, model: Model) -> None:
        """Finds the shapes in which the model's rows get the same bits.

        Each batch is tried by itself, so that other models' forward passes run in between.
        """
        checkpoint, info, found = model.checkpoint, self._engine.info(), {}
        served = info.buckets_for(checkpoint.config.max_position)
        tried = probes(served, checkpoint.compute_dtype, info.mesh.get("fsdp", 1))
        model.monitor.expect("prove", len(tried))
        try:
            for probe in tried:
                model.monitor.check()
                found[probe] = await self.device_thread.run(self._engine.probe, model.handle, probe)
                model.monitor.advance("prove", 1)
            model.buckets = agreeing(served, found)
        except BaseException:
            await self.device_thread.run(self._engine.unload, model.handle)
            raise
        if left_out := [f"{b.rows}x{b.length}" for b in served if b not in model.buckets]:
            text = "model %s does not run in %s: rows would get other bits than in larger shapes"
            _log.info(text, model.handle, ", ".join(left_out))

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
        del self.models[model.handle]
        self.budget.release(model.handle)
        self._leases.drop(model.handle, unloaded=end is not State.FAILED)
        model.enter(end)


def _name_of(error: BaseException) -> str:
    return str(error.reason) if isinstance(error, ModelError | ServerError) else "INTERNAL"


def _end_of(error: BaseException) -> State:
    cancelled = isinstance(error, asyncio.CancelledError) or (
        isinstance(error, ModelError) and error.reason is ModelReason.LOAD_CANCELLED
    )
    return State.CANCELLED if cancelled else State.FAILED
