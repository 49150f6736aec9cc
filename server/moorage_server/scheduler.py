"""Runs the requests of all clients on the devices. Everything here runs in one event loop."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moorage_server.activity import Activity
from moorage_server.answers import RETENTION_SECONDS, AnswerTable
from moorage_server.device_thread import DeviceThread
from moorage_server.engine import Engine
from moorage_server.errors import Reason, ServerError
from moorage_server.fair_queue import FairQueue, Pick, excess
from moorage_server.jobs import Job
from moorage_server.lifecycle import State
from moorage_server.limits import Limits
from moorage_server.scoring import run_batch
from moorage_server.speeds import Speeds
from moorage_server.tasks import start

#: How many tokens may wait, padding included.
QUEUE_TOKENS = 1 << 20

#: How many bytes the requests may take that somebody waits for, with their answers.
ANSWER_BYTES = 4 << 30

_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS, _UNKNOWN_SECONDS = 0.1, 60.0, 1.0


class Scheduler:
    """Takes requests, merges their rows into batches, and runs one batch after another.

    Attributes:
        queue: The rows that wait.
        answer_bytes: How many bytes the requests may take that somebody waits for.
        callers: How many wait for answers, or take them.
        limits: What clients may have.
        activity: What has been done.
    """

    def __init__(
        self,
        engine: Engine,
        device_thread: DeviceThread,
        queue_tokens: int = QUEUE_TOKENS,
        answer_bytes: int = ANSWER_BYTES,
        now: Callable[[], float] = time.monotonic,
        *,
        limits: Limits | None = None,
        activity: Activity | None = None,
    ) -> None:
        """Makes a scheduler with nothing to do.

        Args:
            engine: What owns the mesh.
            device_thread: Where batches run.
            queue_tokens: How many tokens may wait, padding included.
            answer_bytes: How many bytes the requests may take that somebody waits for.
            now: The clock, in seconds.
            limits: What clients may have.
            activity: Where is counted what is done.
        """
        self._engine = engine
        self._device_thread = device_thread
        self._devices = engine.info().mesh.get("fsdp", 1)
        self._now = now
        self._answers: AnswerTable[Job] = AnswerTable()
        self._nbytes: Counter[str] = Counter()  # of those that somebody waits for, by client
        self._speeds = Speeds(now)
        self._running: asyncio.Task[None] | None = None
        self.queue = FairQueue(queue_tokens)
        self.answer_bytes = answer_bytes
        self.callers = 0
        self.limits = limits or Limits()
        self.activity = activity or Activity()

    def find(self, request_id: str, fingerprint: bytes) -> Job | None:
        """A request that was taken before, by its id.

        One that had not run when its model went is forgotten: it begins anew.

        Raises:
            ServerError: INVALID_REQUEST if it is not the same.
        """
        job = self._answers.get(request_id, fingerprint)
        if job and job.is_put_aside and job.model.state is not State.READY:
            self._answers.drop(request_id)
            return None
        return job

    def check_room(self, client: str, tokens: int) -> None:
        """Refuses a request that would be too much, for its caller to know before it is looked at.

        Args:
            client: Who asks.
            tokens: How many tokens it has, at the least.

        Raises:
            ServerError: QUEUE_FULL; LIMIT_EXCEEDED.
        """
        if waiting := self.queue.tokens_of(client):
            self.limits.check("client_tokens", waiting, tokens)
        if too_many := self.queue.excess(client, tokens):
            text = (
                f"{self.queue.tokens} tokens wait, {self.queue.tokens_of(client)} of them this "
                f"client's; {self.queue.capacity} may, and no client may have more than is left "
                "free"
            )
            wait = too_many / self._speeds.pace if self._speeds.pace else _UNKNOWN_SECONDS
            raise _full(text, wait, self.queue.capacity)

    def take(self, job: Job, *, fingerprint: bytes = b"", seconds_left: float | None = None) -> Job:
        """Takes a request, which runs while somebody waits for it.

        Args:
            job: The request.
            fingerprint: A digest of it, for callers that come back.
            seconds_left: Until when its answer is wanted; None for any time.

        Returns:
            The request, or the same one that was taken before.

        Raises:
            ServerError: QUEUE_FULL; DEADLINE_TOO_SHORT; INVALID_REQUEST.
        """
        if found := self.find(job.request_id, fingerprint):
            return found
        self.check_room(job.client, job.tokens)
        self._check_bytes(job)
        self._check_deadline(job, seconds_left)
        job.taken = self._now()
        self._answers.add(job.request_id, fingerprint, job)
        return job

    def answered(self, job: Job) -> None:
        """Takes note that a caller gets the answer; of those who share it, or come back, once."""
        if not job.answered:
            job.answered, tokens = True, len(job.work.rows.tokens)
            job.model.answer(tokens)
            queue = max(0.0, (job.started or job.taken) - job.taken)
            self.activity.answer(tokens, {"queue": queue, **vars(job.work.timings)})

    @contextmanager
    def waiting(self, job: Job) -> Iterator[None]:
        """Has a request run while somebody waits for it, or takes its answer.

        When the last one leaves, what has not run is put aside; work that was begun, and answers,
        are kept for a while if the request can be found again.

        Raises:
            ServerError: MODEL_NOT_LOADED if the model has gone while nobody waited.
        """
        if job.is_put_aside:
            self.queue.add(job)
            self._wake()
        if not job.callers:
            self._nbytes[job.client] += job.nbytes
        job.callers += 1
        self.callers += 1
        self._answers.back(job.request_id)
        try:
            yield
        finally:
            job.callers -= 1
            self.callers -= 1
            if not job.callers:
                self._leave(job)

    def _leave(self, job: Job) -> None:
        self.queue.remove(job)
        self._nbytes[job.client] -= job.nbytes
        if not self._nbytes[job.client]:
            del self._nbytes[job.client]
        if job.request_id:
            self._answers.leave(job.request_id, job.nbytes, self._now())
            if job.error:  # which may be over by the time that it comes again
                self._answers.drop(job.request_id)
            asyncio.get_running_loop().call_later(RETENTION_SECONDS, self._expire)

    def _expire(self) -> None:
        self._answers.expire(self._now())

    def _check_bytes(self, job: Job) -> None:
        """Refuses a request that would take too much; shares are as those of the queue."""
        held, own = self._nbytes.total(), self._nbytes[job.client]
        if excess(held, own, job.nbytes, self.answer_bytes):
            text = (
                f"this request takes {job.nbytes} bytes, those before it {held}, {own} of them "
                f"this client's; in all they may have {self.answer_bytes} (max_waiting_bytes), and "
                "no client may have more than is left free"
            )
            raise _full(text, _UNKNOWN_SECONDS, self.answer_bytes)

    def _check_deadline(self, job: Job, seconds_left: float | None) -> None:
        if seconds_left is None:
            return
        others = self.queue.ahead_of(job) - job.tokens
        wanted = self._speeds.least_seconds(job.model.handle, job.tokens, others)
        if wanted is not None and wanted > seconds_left:
            raise ServerError(
                Reason.DEADLINE_TOO_SHORT,
                f"the answer would take {wanted:.1f} s, and is wanted in {seconds_left:.1f} s: "
                "give more time, or send fewer rows",
            )

    def _wake(self) -> None:
        if self._running is None and self.queue.tokens:
            self._running = start(self._run())

    async def _run(self) -> None:
        """Runs batches until nothing waits."""
        try:
            while pick := self.queue.pick(self._speeds.seconds):
                await self._run_batch(pick)
        finally:
            self._running = None

    async def _run_batch(self, pick: Pick) -> None:
        begin = self._now()
        for job in pick.jobs:
            job.started = job.started or begin
        try:
            seconds = await self._device_thread.run(self._forward, pick)
        except Exception as error:  # of the engine: none of them can have an answer
            for job in pick.jobs:
                self.queue.remove(job)
                job.fail(error)
        else:
            self._speeds.note(pick.jobs[0].model.handle, pick.bucket, pick.tokens, seconds)
            slots = pick.bucket.rows * pick.bucket.length
            self.activity.run_batch(sum(piece.length for piece in pick.pieces), slots)
        for job in pick.jobs:
            job.settle(1)

    def _forward(self, pick: Pick) -> float:
        """Runs on the device thread; gives the seconds that it took."""
        begin, handle = time.monotonic(), pick.jobs[0].model.handle
        run_batch(
            pick.pieces,
            pick.bucket,
            self._devices,
            lambda batch, questions: self._engine.forward(handle, batch, questions),
        )
        return time.monotonic() - begin


def _full(text: str, wait: float, limit: int) -> ServerError:
    wait = min(max(wait, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)
    message = f"{text}: try again in {wait:.1f} s"
    return ServerError(Reason.QUEUE_FULL, message, retry_after=wait, limit=str(limit))
