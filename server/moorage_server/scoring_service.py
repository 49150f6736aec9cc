"""The servicer of ScoringService: forward passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import grpc.aio

from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_server import answering
from moorage_server.cache import ModelCache
from moorage_server.calls import caller
from moorage_server.draining import Draining
from moorage_server.engine import Engine
from moorage_server.engine.outputs import served
from moorage_server.errors import Reason, ServerError
from moorage_server.jobs import Job
from moorage_server.model import WEIGHTS_VERSION, Model
from moorage_server.rows import make_rows
from moorage_server.scheduler import Scheduler
from moorage_server.scoring import make_work

_HEARTBEAT_SECONDS = 1.0

Context = grpc.aio.ServicerContext[Any, Any]


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
            progress = pb.ForwardProgress(
                rows=len(request.row_lengths), queued_tokens=self._scheduler.queue.tokens
            )
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
