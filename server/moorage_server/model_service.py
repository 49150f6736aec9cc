"""The servicer of ModelService: models come, stay and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.errors import ModelError
from moorage_server import convert
from moorage_server.access import Role
from moorage_server.cache import ModelCache
from moorage_server.calls import caller
from moorage_server.draining import Draining
from moorage_server.leases import check_seconds
from moorage_server.lifecycle import State
from moorage_server.model import Model

_HEARTBEAT_SECONDS = 1.0

Context = grpc.aio.ServicerContext[Any, Any]


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
