"""The servicers: the wire on one side, the cache and the engine on the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import google_crc32c
import grpc.aio
import numpy as np

from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.checkpoint import name_of
from moorage_models.errors import ModelError
from moorage_models.families import FAMILIES, PRESETS
from moorage_models.naming import ModelNaming, find_preset
from moorage_models.plan import Plan, preset_plan
from moorage_models.sources import SOURCES, Policy
from moorage_server import __version__, convert
from moorage_server.cache import ModelCache
from moorage_server.engine import Bucket, Engine
from moorage_server.engine.outputs import OUTPUTS
from moorage_server.leases import check_seconds
from moorage_server.lifecycle import State
from moorage_server.model import Model
from moorage_server.scoring import MAX_OUTPUT_BYTES, Rows, check_rows, make_rows, score

MAX_MESSAGE_BYTES = 4 << 20
CHUNK_BYTES = 1 << 20
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
                checkpoint = await self._cache.look(wanted)
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

    def __init__(self, cache: ModelCache) -> None:
        self._cache = cache

    async def LoadModel(  # noqa: N802
        self, request: pb.LoadModelRequest, context: Context
    ) -> AsyncIterator[pb.LoadModelResponse]:
        """Joins or starts a load; it goes on when its callers leave, unless they want otherwise."""
        lease_seconds, model = _lease_seconds(request), None
        while model is None or model.state is not State.READY:  # evicted as this one came
            started: asyncio.Future[Model] = asyncio.get_running_loop().create_future()
            async with aclosing(self._wait(request, started)) as wait:
                async for progress in wait:
                    yield pb.LoadModelResponse(progress=progress)
            model = started.result()
        response = pb.LoadModelResponse()
        if lease_seconds:  # before anything else may run: from here on nobody waits for it
            lease = self._cache.lease(model, request.lease.client, lease_seconds)
            response.lease.CopyFrom(convert.to_lease(lease, self._cache.leases.now()))
        response.model.CopyFrom(self._describe(model))
        yield response

    async def _wait(
        self, request: pb.LoadModelRequest, started: asyncio.Future[Model]
    ) -> AsyncGenerator[pb.LoadProgress, None]:
        """Joins or starts a load, and yields its progress until it is over."""
        begin, wanted = time.monotonic(), convert.to_request(request.model)
        join = self._cache.join(wanted, abandonable=request.cancel_if_abandoned)
        try:
            while not (await asyncio.wait([join], timeout=_HEARTBEAT_SECONDS))[0]:
                yield pb.LoadProgress(
                    state=pb.MODEL_STATE_RESOLVING,
                    stages=convert.to_stages(self._cache.resolving(wanted)),
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
        """One model."""
        return pb.GetModelResponse(model=self._describe(self._cache.get(request.handle)))

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Every model."""
        return pb.ListModelsResponse(models=map(self._describe, self._cache.models()))

    async def UnloadModel(  # noqa: N802
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.UnloadModelResponse:
        """Drains and frees."""
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
    """
    if not request.HasField("lease"):
        return 0.0
    seconds = request.lease.duration.ToNanoseconds() / 1e9
    check_seconds(seconds)
    return seconds


class ScoringService(pb_grpc.ScoringServiceServicer):
    """Runs forward passes."""

    def __init__(self, cache: ModelCache, engine: Engine) -> None:
        self._cache = cache
        self._engine = engine

    async def Forward(  # noqa: N802
        self, request: pb.ForwardRequest, context: Context
    ) -> AsyncIterator[pb.ForwardResponse]:
        """Scores ragged rows."""
        model = await self._cache.when_ready(request.handle)
        outputs = [name for name in OUTPUTS if getattr(request.outputs, name)] or ["logprobs"]
        rows = make_rows(request.token_ids, request.row_lengths, request.segment_ids)
        check_rows(rows, model.checkpoint.config, outputs, self._buckets(model))
        with model.use(len(rows.tokens)):
            queued = time.monotonic()
            started, ended, values = await self._cache.device_thread.run(
                self._score, model, rows, outputs
            )
        header = _header(model, values)
        header.queue_time.CopyFrom(convert.duration(started - queued))
        header.execute_time.CopyFrom(convert.duration(ended - started))
        yield pb.ForwardResponse(header=header)
        for chunk in _chunks(list(values.values())):
            yield pb.ForwardResponse(chunk=chunk)

    def _score(
        self, model: Model, rows: Rows, outputs: Sequence[str]
    ) -> tuple[float, float, dict[str, np.ndarray]]:
        """Runs on the device thread; with the times of its beginning and end."""
        begin = time.monotonic()
        values = score(
            rows,
            model.checkpoint.config,
            outputs,
            self._buckets(model),
            lambda batch, names: self._engine.forward(model.handle, batch, names),
        )
        return begin, time.monotonic(), values

    def _buckets(self, model: Model) -> Sequence[Bucket]:
        return self._engine.info().buckets_for(model.checkpoint.config.max_position)


class ServerService(pb_grpc.ServerServiceServicer):
    """Describes the server."""

    def __init__(self, cache: ModelCache, engine: Engine, policy: Policy) -> None:
        self._cache = cache
        self._engine = engine
        self._policy = policy
        self._started = time.time()

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        """Version, devices, mesh and limits."""
        info = self._engine.info()
        models = [m for m in self._cache.models() if m.state is State.READY]
        sources = SOURCES if self._policy.sources is None else self._policy.sources
        return pb.GetServerInfoResponse(
            version=__version__,
            platform=info.platform,
            devices=[
                pb.Device(
                    id=device.id,
                    kind=device.kind,
                    model_bytes=sum(m.device_bytes.get(device.id, 0) for m in models),
                )
                for device in info.devices
            ],
            mesh=[pb.MeshAxis(name=name, size=size) for name, size in info.mesh.items()],
            buckets=[pb.Bucket(rows=b.rows, length=b.length) for b in info.buckets],
            limits=pb.Limits(
                max_message_bytes=MAX_MESSAGE_BYTES,
                max_sequence_length=info.buckets[-1].length,
                max_output_bytes=MAX_OUTPUT_BYTES,
            ),
            sources=[convert.source_name(source) for source in sources],
            outputs=list(OUTPUTS),
            start_time=convert.timestamp(self._started),
            memory=pb.Memory(
                budget_bytes=self._cache.budget.capacity,
                reserved_bytes=self._cache.budget.reserved(),
                live_bytes=convert.to_device_bytes(self._engine.live_bytes()),
                host_pool_bytes=self._engine.pool_bytes(),
            ),
        )


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


def _header(model: Model, values: Mapping[str, np.ndarray]) -> pb.ForwardHeader:
    checkpoint = model.checkpoint
    return pb.ForwardHeader(
        handle=model.handle,
        model_id=checkpoint.request.model_id,
        revision=checkpoint.repository.revision,
        dtype=checkpoint.plan.dtype,
        compute_dtype=checkpoint.compute_dtype,
        tensors=[
            pb.TensorHeader(name=name, dtype=value.dtype.name, shape=value.shape)
            for name, value in values.items()
        ],
        semantics=pb.Semantics(temperature=1.0, head_dtype="float32", first_token="nan"),
    )


def _chunks(values: Sequence[np.ndarray]) -> Iterator[pb.TensorChunk]:
    """The tensors' little-endian bytes in order, in runs with checksums."""
    for tensor, value in enumerate(values):
        little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        view = memoryview(little.reshape(-1).view(np.uint8).data)
        for offset in range(0, len(view), CHUNK_BYTES):
            data = bytes(view[offset : offset + CHUNK_BYTES])
            checksum = google_crc32c.value(data)
            yield pb.TensorChunk(tensor=tensor, offset=offset, crc32c=checksum, data=data)
