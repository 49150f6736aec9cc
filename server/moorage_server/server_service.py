"""What the server says of itself: to callers, to metrics and on its page, in the same numbers."""

from __future__ import annotations

import time
from typing import Any

import grpc.aio

from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.sources import SOURCES, Policy
from moorage_server import __version__, convert
from moorage_server.activity import Activity
from moorage_server.answers import RETAINED_BYTES, RETENTION_SECONDS
from moorage_server.cache import ModelCache
from moorage_server.engine import Engine
from moorage_server.engine.outputs import OUTPUTS
from moorage_server.lifecycle import State
from moorage_server.limits import Gate
from moorage_server.requests import MAX_OUTPUT_BYTES
from moorage_server.scheduler import Scheduler

MAX_MESSAGE_BYTES = 4 << 20


class ServerService(pb_grpc.ServerServiceServicer):
    """Describes the server."""

    def __init__(
        self, cache: ModelCache, engine: Engine, policy: Policy, scheduler: Scheduler, gate: Gate
    ) -> None:
        self._cache = cache
        self._engine = engine
        self._scheduler = scheduler
        self._policy = policy
        self._gate = gate
        self._started = time.time()

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetServerInfoResponse:
        """Version, devices, mesh, limits and activity."""
        return self.describe()

    def describe(self) -> pb.GetServerInfoResponse:
        """The server as it is now."""
        info = self._engine.info()
        sources = SOURCES if self._policy.sources is None else self._policy.sources
        return pb.GetServerInfoResponse(
            version=__version__,
            platform=info.platform,
            devices=self._devices(),
            mesh=[pb.MeshAxis(name=name, size=size) for name, size in info.mesh.items()],
            buckets=convert.to_buckets(info.buckets),
            limits=self._limits(),
            sources=[convert.source_name(source) for source in sources],
            outputs=[name for name in OUTPUTS if any(name in p.outputs for p in info.profiles)],
            start_time=convert.timestamp(self._started),
            memory=pb.Memory(
                budget_bytes=self._cache.budget.capacity,
                reserved_bytes=self._cache.budget.reserved(),
                live_bytes=convert.to_device_bytes(self._engine.live_bytes()),
                host_pool_bytes=self._engine.pool_bytes(),
            ),
            profiles=[pb.OutputProfile(outputs=p.outputs, size=p.size) for p in info.profiles],
            compiles_after_ready=self._engine.compiles_after_ready(),
            activity=self._activity(),
        )

    def models(self) -> list[pb.Model]:
        """Every model as it is now, the oldest first."""
        now = self._cache.leases.now()
        return [convert.to_model(self._cache.snapshot(m), now) for m in self._cache.models()]

    def layout(self, handle: str) -> list[pb.ParameterLayout]:
        """How a model's parameters lie on the mesh, the largest first.

        Raises:
            ServerError: MODEL_NOT_LOADED.
        """
        return convert.to_layout(self._cache.get(handle).checkpoint.plan, self._cache.mesh)

    def _devices(self) -> list[pb.Device]:
        models = [m for m in self._cache.models() if m.state is State.READY]
        return [
            pb.Device(
                id=device.id,
                kind=device.kind,
                model_bytes=sum(m.device_bytes.get(device.id, 0) for m in models),
            )
            for device in self._engine.info().devices
        ]

    def _limits(self) -> pb.Limits:
        limits = self._gate.limits
        return pb.Limits(
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_sequence_length=self._engine.info().buckets[-1].length,
            max_output_bytes=MAX_OUTPUT_BYTES,
            max_queued_tokens=self._scheduler.queue.capacity,
            answer_retention=convert.duration(RETENTION_SECONDS),
            max_retained_bytes=RETAINED_BYTES,
            max_requests=limits.requests,
            max_client_requests=limits.client_requests,
            max_client_tokens=limits.client_tokens,
            max_connections=limits.connections,
            max_models=limits.models,
            max_client_models=limits.client_models,
            max_leases=limits.leases,
            max_client_leases=limits.client_leases,
            max_waiting_bytes=self._scheduler.answer_bytes,
        )

    def _activity(self) -> pb.Activity:
        done: Activity = self._cache.activity
        return pb.Activity(
            requests=self._gate.requests,
            forwards_under_way=self._scheduler.callers,
            queued_tokens=self._scheduler.queue.tokens,
            leases=len(self._cache.leases.all()),
            forwards=done.forwards,
            tokens=done.tokens,
            batches=done.batches,
            batch_tokens=done.batch_tokens,
            batch_slots=done.batch_slots,
            loads=convert.to_counts(done.loads),
            refusals=convert.to_counts(done.refusals),
            errors=map(convert.to_recent_error, done.errors),
        )
