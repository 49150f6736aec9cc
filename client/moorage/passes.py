"""What runs forward passes: threads for one client, tasks for the other. Both go the same way."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from moorage.attempts import ForwardWatch
from moorage.batch import Batch, Part
from moorage.errors import Cancelled, Error, translated
from moorage.scores import Scores, joined
from moorage.transport import Call, cancelling, closed
from moorage.v1 import moorage_pb2 as pb

REQUESTS = 4
"""Requests of one batch that are in flight at a time."""

THREADS = 32
"""Futures of one client that are in flight at a time; others wait for their turn."""


class Stop:
    """Ends one forward pass from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: set[Call] = set()
        self._stopped = threading.Event()

    def set(self) -> None:
        """Cancels its calls, and wakes it if it sleeps."""
        with self._lock:
            self._stopped.set()
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    @contextmanager
    def over(self, call: Any) -> Iterator[Any]:
        """Lets `set` cancel a call within its block; at its end the call is cancelled anyway.

        Args:
            call: The call.

        Yields:
            The call.
        """
        with self._lock:
            self._calls.add(call)
        try:
            self.sleep(0.0)
            yield call
        finally:
            call.cancel()
            self._calls.discard(call)

    def sleep(self, seconds: float) -> None:
        """Sleeps, unless it is stopped.

        Args:
            seconds: How long; 0 to look only.

        Raises:
            Cancelled: It is stopped.
        """
        if self._stopped.wait(seconds):
            raise _stopped()


class ThreadPasses:
    """Runs forward passes in the threads that call, and in threads of its own.

    Args:
        scoring: The stub of the ScoringService.
        address: The server, for errors.

    Attributes:
        answered: Whether the server has answered any call of the client.
    """

    def __init__(self, scoring: Any, address: str) -> None:
        self.answered = False
        self._scoring = scoring
        self._address = address
        self._pool = ThreadPoolExecutor(THREADS, "moorage forward")
        self._stops: set[Stop] = set()
        self._futures: set[Future[Scores]] = set()
        _before_threads_are_joined(weakref.WeakMethod(self.stop))

    def run(self, batch: Batch) -> Scores:
        """Runs a forward pass.

        Args:
            batch: The pass.

        Returns:
            The scores.

        Raises:
            Error: It failed, or `stop` was called.
        """
        stop = Stop()
        self._stops.add(stop)
        try:
            return self._run(batch, stop)
        finally:
            self._stops.discard(stop)

    def start(self, batch: Batch) -> Future[Scores]:
        """Begins a forward pass in a thread of its own.

        Args:
            batch: The pass.

        Returns:
            Its future. It is never in the state of running, in which no future can be cancelled.
        """
        future: Future[Scores] = Future()
        stop = Stop()

        def done(ended: Future[Scores]) -> None:  # holds no future, and so no scores
            self._futures.discard(ended)
            if ended.cancelled():
                ended.set_running_or_notify_cancel()  # tells those who wait for it
                stop.set()

        self._futures.add(future)
        future.add_done_callback(done)
        try:
            self._pool.submit(self._settle, future, batch, stop)
        except RuntimeError as error:  # of a pool that is shut down
            future.cancel()
            raise closed(self._address) from error
        return future

    def stop(self) -> None:
        """Cancels everything."""
        for future in list(self._futures):
            future.cancel()
        for stop in list(self._stops):
            stop.set()
        self._pool.shutdown(wait=False)

    def join(self) -> None:
        """Waits for its own threads, once the channel is closed: then no call can go on."""
        self._pool.shutdown()

    def _settle(self, future: Future[Scores], batch: Batch, stop: Stop) -> None:
        settle: Callable[[], None]
        try:
            settle = partial(future.set_result, self._run(batch, stop))
        except BaseException as error:  # whatever it is, it is for those who wait
            settle = partial(future.set_exception, error)
        with suppress(InvalidStateError):  # it was cancelled
            settle()

    def _run(self, batch: Batch, stop: Stop) -> Scores:
        if len(batch.parts) == 1:
            return self._score(batch.parts[0], batch.deadline, stop)
        with ThreadPoolExecutor(REQUESTS, "moorage request") as pool:
            parts = [pool.submit(self._score, part, batch.deadline, stop) for part in batch.parts]
            try:
                for part in as_completed(parts):
                    part.result()
            except BaseException:
                stop.set()
                raise
        return joined([part.result() for part in parts])

    def _score(self, part: Part, deadline: float, stop: Stop) -> Scores:
        """Follows one request, or if its answer would be too large, one after another for it."""
        try:
            watch = ForwardWatch(part.request(), deadline, answered=self.answered)
            return self._follow(watch, stop)
        except Error as error:
            halves = part.halves(error)
        self.answered = True
        return joined([self._score(half, deadline, stop) for half in halves])

    def _follow(self, watch: ForwardWatch, stop: Stop) -> Scores:
        while not watch.complete:
            stop.sleep(0.0)
            call = self._call(*watch.begin())
            try:
                with translated(self._address), stop.over(call) as responses:
                    for response in responses:
                        self.answered = True
                        watch.see(response)
                break
            except Error as error:
                pause = watch.pause(error)
            stop.sleep(pause)
        return watch.scores()

    def _call(self, request: pb.ForwardRequest, timeout: float | None) -> Any:
        try:
            return self._scoring.Forward(request, timeout=timeout)
        except ValueError as error:  # gRPC's word for a call on a closed channel
            raise closed(self._address) from error


class TaskPasses:
    """Runs forward passes in tasks.

    Args:
        scoring: The asyncio stub of the ScoringService.
        address: The server, for errors.

    Attributes:
        answered: Whether the server has answered any call of the client.
    """

    def __init__(self, scoring: Any, address: str) -> None:
        self.answered = False
        self._scoring = scoring
        self._address = address
        self._stopped = asyncio.Event()

    async def run(self, batch: Batch) -> Scores:
        """Runs a forward pass; see `ThreadPasses.run`."""
        if len(batch.parts) == 1:
            return await self._score(batch.parts[0], batch.deadline)
        turns = asyncio.Semaphore(REQUESTS)

        async def score(part: Part) -> Scores:
            async with turns:
                return await self._score(part, batch.deadline)

        try:
            async with asyncio.TaskGroup() as group:
                parts = [group.create_task(score(part)) for part in batch.parts]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return joined([part.result() for part in parts])

    def stop(self) -> None:
        """Ends what waits to try again; a closed channel ends the rest."""
        self._stopped.set()

    async def _score(self, part: Part, deadline: float) -> Scores:
        """Follows one request, or if its answer would be too large, one after another for it."""
        try:
            watch = ForwardWatch(part.request(), deadline, answered=self.answered)
            return await self._follow(watch)
        except Error as error:
            halves = part.halves(error)
        self.answered = True
        return joined([await self._score(half, deadline) for half in halves])

    async def _follow(self, watch: ForwardWatch) -> Scores:
        while not watch.complete:
            request, timeout = watch.begin()
            try:
                call = self._scoring.Forward(request, timeout=timeout)
                with translated(self._address), cancelling(call) as responses:
                    async for response in responses:
                        self.answered = True
                        watch.see(response)
                break
            except Error as error:
                pause = watch.pause(error)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._stopped.is_set() and task and not task.cancelling():
                    raise _stopped() from None
                raise
            await self._sleep(pause)
        return watch.scores()

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
            raise _stopped()


def _stopped() -> Error:
    return Cancelled("the forward pass was cancelled, or its client was closed")


def _before_threads_are_joined(stop: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Stops passes when the interpreter ends, which waits for their threads before `atexit`.

    A trainer that failed would else stay until all is scored that it asked for.
    """

    def ended() -> None:
        if method := stop():
            method()

    register: Callable[[Callable[[], None]], None] = threading._register_atexit  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    with suppress(RuntimeError):  # it ends already, and starts no more threads
        register(ended)
