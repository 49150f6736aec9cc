"""The servicers: the wire on one side, the cache and the engine on the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import grpc.aio

from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.checkpoint import name_of
from moorage_models.errors import ModelError
from moorage_models.families import FAMILIES, PRESETS
from moorage_models.naming import ModelNaming, find_preset
from moorage_models.plan import Plan, preset_plan
from moorage_server import answering, convert
from moorage_server.access import Role
from moorage_server.cache import ModelCache
from moorage_server.calls import caller
from moorage_server.draining import Draining
from moorage_server.engine import Engine
from moorage_server.engine.outputs import served
from moorage_server.errors import Reason, ServerError
from moorage_server.jobs import Job
from moorage_server.leases import check_seconds
from moorage_server.lifecycle import State
from moorage_server.model import WEIGHTS_VERSION, Model
from moorage_server.rows import make_rows
from moorage_server.scheduler import Scheduler
from moorage_server.scoring import make_work

_HEARTBEAT_SECONDS = 1.0

Context = grpc.aio.ServicerContext[Any, Any]


class NamingService(pb_grpc.NamingServiceServicer):
    """What names mean."""

    def __init__(self, cache: ModelCache, engine: Engine) -> None:
        self._cache = cache
        self._engine = engine

    async def ResolveName(  # noqa: N802
        self, request: pb.ResolveNameRequest, context: Context
    ) -> pb.ResolveNameResponse:
        """Naming attributes, and with a source whether it can be loaded."""
        wanted = convert.to_request(request.model)
        preset = _preset(request.model.model_id)
        if request.check_source or (request.estimate and preset is None):
            try:
                checkpoint = await self._cache.looks.look(wanted, caller().name)
            except ModelError as error:
                return _refused(request.model.model_id, error)
            response, plan = convert.loadable(checkpoint), checkpoint.plan
        else:
            naming = ModelNaming(model_id=request.model.model_id)
            response = pb.ResolveNameResponse(
                name=convert.to_name(naming, request.model.model_id),
                checked=["name"] + ["preset"] * (preset is not None),
                loadable=True,
            )
            if preset is None:
                return response
            response.config.CopyFrom(convert.to_config(preset))
            plan = preset_plan(preset, request.model.dtype)
        if request.estimate:
            self._estimate(plan, wanted.compute_dtype or plan.dtype, response)
        return response

    def _estimate(
        self, plan: Plan[Any], compute_dtype: str, response: pb.ResolveNameResponse
    ) -> None:
        """Says what a load would take, find and evict."""
        need, budget = self._engine.need(plan, compute_dtype), self._cache.budget
        devices = {device.id: need.weights for device in self._engine.info().devices}
        response.device_bytes.extend(convert.to_device_bytes(devices))
        evicted = self._cache.estimate(need)
        response.budget.CopyFrom(
            pb.BudgetEstimate(
                needed_bytes=need.weights + need.temporaries,
                free_bytes=budget.capacity - budget.reserved(),
                fits=evicted is not None,
                evicted=evicted or (),
            )
        )

    async def ListSupportedModels(  # noqa: N802
        self, request: pb.ListSupportedModelsRequest, context: Context
    ) -> pb.ListSupportedModelsResponse:
        """Every preset."""
        return pb.ListSupportedModelsResponse(
            models=[
                pb.SupportedModel(
                    model_config_id=name,
                    model_config_category=FAMILIES[config.family].category,
                    config=convert.to_config(config),
                )
                for name, config in sorted(PRESETS.items())
            ]
        )


class ModelService(pb_grpc.ModelServiceServicer):
    """Loads, lists and unloads."""

    def __init__(self, cache: ModelCache, draining: Draining) -> None:
        self._cache = cache
        self._draining = draining

    async def LoadModel(  # noqa: N802
        self, request: pb.LoadModelRequest, context: Context
    ) -> AsyncIterator[pb.LoadModelResponse]:
        """Joins or starts a load; it goes on when its callers leave, unless they want otherwise."""
        self._draining.check()
        lease_seconds, model = _lease_seconds(request), None
        client = caller().name
        while model is None or model.state is not State.READY:  # evicted as this one came
            started: asyncio.Future[Model] = asyncio.get_running_loop().create_future()
            try:
                async with aclosing(self._wait(request, client, started)) as wait:
                    async for progress in wait:
                        yield pb.LoadModelResponse(progress=progress)
            except ModelError:
                self._draining.check()  # it was cancelled for that, and can be asked for again
                raise
            model = started.result()
        response = pb.LoadModelResponse()
        if lease_seconds:  # before anything else may run: from here on nobody waits for it
            lease = self._cache.lease(model, request.lease.client, lease_seconds, client)
            response.lease.CopyFrom(convert.to_lease(lease, self._cache.leases.now()))
        response.model.CopyFrom(self._describe(model))
        yield response

    async def _wait(
        self, request: pb.LoadModelRequest, client: str, started: asyncio.Future[Model]
    ) -> AsyncGenerator[pb.LoadProgress, None]:
        """Joins or starts a load, and yields its progress until it is over."""
        begin, wanted = time.monotonic(), convert.to_request(request.model)
        join = self._cache.join(wanted, abandonable=request.cancel_if_abandoned, client=client)
        try:
            while not (await asyncio.wait([join], timeout=_HEARTBEAT_SECONDS))[0]:
                yield pb.LoadProgress(
                    state=pb.MODEL_STATE_RESOLVING,
                    stages=convert.to_stages(self._cache.looks.stages(wanted)),
                    elapsed=convert.duration(time.monotonic() - begin),
                )
        except (asyncio.CancelledError, GeneratorExit):
            self._cache.leave(join)
            raise
        model = join.result()
        started.set_result(model)
        last, sent = pb.LoadProgress(), 0.0
        async with aclosing(self._cache.watch(model)) as watch:
            async for _ in watch:
                progress = convert.to_progress(model)
                if time.monotonic() - sent > _HEARTBEAT_SECONDS or progress.stages != last.stages:
                    last, sent = progress, time.monotonic()
                    yield progress

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse:
        """One model, and how its parameters lie on the mesh."""
        model = self._cache.get(request.handle)
        layout = convert.to_layout(model.checkpoint.plan, self._cache.mesh)
        return pb.GetModelResponse(model=self._describe(model), layout=layout)

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Every model."""
        return pb.ListModelsResponse(models=map(self._describe, self._cache.models()))

    async def UnloadModel(  # noqa: N802
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.UnloadModelResponse:
        """Drains and frees."""
        if request.force:
            caller().check(Role.ADMIN, "unloading a model that others lease")
        freed = await self._cache.unload(request.handle, request.lease_id, request.force)
        return pb.UnloadModelResponse(device_bytes=convert.to_device_bytes(freed))

    async def RenewLease(  # noqa: N802
        self, request: pb.RenewLeaseRequest, context: Context
    ) -> pb.RenewLeaseResponse:
        """Lets a lease last its whole duration again."""
        lease = self._cache.renew(request.lease_id)
        return pb.RenewLeaseResponse(lease=convert.to_lease(lease, self._cache.leases.now()))

    async def ReleaseLease(  # noqa: N802
        self, request: pb.ReleaseLeaseRequest, context: Context
    ) -> pb.ReleaseLeaseResponse:
        """Ends a lease."""
        self._cache.release(request.lease_id)
        return pb.ReleaseLeaseResponse()

    async def WatchModels(  # noqa: N802
        self, request: pb.WatchModelsRequest, context: Context
    ) -> AsyncIterator[pb.WatchModelsResponse]:
        """What becomes of models, from where the caller was, or from how they are."""
        changes, now = self._cache.changes, self._cache.leases.now
        sequence, known = request.sequence, changes.covers(request.epoch, request.sequence)
        while True:
            if not known:
                sequence, models = changes.sequence, map(self._describe, self._cache.models())
                yield pb.WatchModelsResponse(
                    epoch=changes.epoch, sequence=sequence, snapshot=pb.ModelList(models=models)
                )
            async with aclosing(changes.after(sequence, _HEARTBEAT_SECONDS)) as latest:
                async for change in latest:
                    response = pb.WatchModelsResponse(epoch=changes.epoch, sequence=sequence)
                    if change:
                        sequence = response.sequence = change.sequence
                        response.changed.CopyFrom(convert.to_model(change.value, now()))
                    yield response
            known = False  # it was too slow, and has missed something

    def _describe(self, model: Model) -> pb.Model:
        return convert.to_model(self._cache.snapshot(model), self._cache.leases.now())


def _lease_seconds(request: pb.LoadModelRequest) -> float:
    """How long a lease is asked for; 0 for none.

    Raises:
        ServerError: INVALID_REQUEST for a duration that no lease can have.
        ModelError: INVALID_REQUEST for a name of its holder that is too long or cannot be shown.
    """
    if not request.HasField("lease"):
        return 0.0
    convert.check_name("lease.client", request.lease.client)
    seconds = request.lease.duration.ToNanoseconds() / 1e9
    check_seconds(seconds)
    return seconds


class ScoringService(pb_grpc.ScoringServiceServicer):
    """Runs forward passes."""

    def __init__(
        self, cache: ModelCache, engine: Engine, scheduler: Scheduler, draining: Draining
    ) -> None:
        self._cache = cache
        self._info = engine.info()
        self._scheduler = scheduler
        self._draining = draining

    async def Forward(  # noqa: N802
        self, request: pb.ForwardRequest, context: Context
    ) -> AsyncIterator[pb.ForwardResponse]:
        """Takes a request, or finds it again, and streams its answer."""
        self._draining.check()
        fingerprint = answering.fingerprint(request) if request.request_id else b""
        job = self._scheduler.find(request.request_id, fingerprint)
        if job is None:
            async with aclosing(self._restored(request)) as progress:
                async for response in progress:
                    yield response
            self._draining.check()
            model, client = self._cache.ready(request.handle), caller().name
            self._scheduler.check_room(client, len(request.token_ids))
            job = self._scheduler.take(
                self._job(model, request, client),
                fingerprint=fingerprint,
                seconds_left=context.time_remaining(),
            )
        with self._scheduler.waiting(job):
            async with aclosing(self._finish(job)) as progress:
                async for response in progress:
                    yield response
            work = job.result()
            chunks = answering.chunks(list(work.tensors.values()), request.received_bytes)
            self._scheduler.answered(job)
            yield pb.ForwardResponse(header=answering.header(job, self._info))
            for response in chunks:
                yield response

    async def _restored(
        self, request: pb.ForwardRequest
    ) -> AsyncGenerator[pb.ForwardResponse, None]:
        """Waits for a model that is being restored, with signs of life."""
        while not await self._cache.restored(request.handle, _HEARTBEAT_SECONDS):
            progress = pb.ForwardProgress(rows=len(request.row_lengths))
            yield pb.ForwardResponse(progress=progress)

    async def _finish(self, job: Job) -> AsyncGenerator[pb.ForwardResponse, None]:
        """Waits for a request, with signs of life."""
        if job.finished.is_set():
            return
        rows = len(job.work.rows.lengths)
        with job.model.use():
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_HEARTBEAT_SECONDS):
                        await job.finished.wait()
                        return
                progress = pb.ForwardProgress(
                    rows_done=rows - job.rows_left,
                    rows=rows,
                    queued_tokens=self._scheduler.queue.tokens,
                )
                yield pb.ForwardResponse(progress=progress)

    def _job(self, model: Model, request: pb.ForwardRequest, client: str) -> Job:
        """Checks a request against its model.

        Raises:
            ServerError: WEIGHTS_VERSION_MISMATCH, or whatever is wrong with the request.
        """
        if request.expected_weights_version not in (0, WEIGHTS_VERSION):
            raise ServerError(
                Reason.WEIGHTS_VERSION_MISMATCH,
                f"version {request.expected_weights_version} of the weights is expected; model "
                f"{model.handle} has version {WEIGHTS_VERSION}",
            )
        config, buckets = model.checkpoint.config, model.buckets
        rows = make_rows(request.token_ids, request.row_lengths, request.segment_ids)
        profiles = served(config, self._info.profiles)
        work = make_work(rows, answering.to_wanted(request), config, buckets, profiles)
        return Job(model, client, work, buckets, request.request_id)


def _preset(model_id: str) -> Any:
    naming = name_of(model_id)
    return find_preset(naming.model_config_id) if naming else None


def _refused(model_id: str, error: ModelError) -> pb.ResolveNameResponse:
    return pb.ResolveNameResponse(
        name=convert.to_name(name_of(model_id), model_id),
        checked=["name", "source"],
        reason=str(error.reason),
        message=error.message,
    )
