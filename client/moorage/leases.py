"""The leases that a client holds: what to renew when, and what follows an error; does no I/O."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from moorage import decode
from moorage.answers import Lease
from moorage.errors import Error
from moorage.v1 import moorage_pb2 as pb

FIRST_PAUSE = 0.25
"""Seconds before a failed renewal is tried again; each further try waits twice as long."""

MAX_PAUSE = 30.0
"""Seconds between two tries at the most; less for a lease of less than three times as much."""

MIN_PAUSE = 0.02
"""Seconds between two renewals at the least, however short the lease."""

_REFUSALS = frozenset({"MODEL_LEASED", "PERMISSION_DENIED"})  # the model surely stays

_log = logging.getLogger("moorage")


@dataclass(frozen=True)
class Held:
    """One lease, as its holder sees it.

    Attributes:
        handle: The model.
        request: What gives the model and a lease again.
        lease: The lease, as it was when it was taken or renewed.
        expires: When it ends, on the clock of `Leases`.
        due: When the next step is to be taken.
        lost: The server does not know it any more: the next step is to load, not to renew.
        failures: How often the next step has failed.
    """

    handle: str
    request: pb.LoadModelRequest
    lease: Lease
    expires: float
    due: float
    lost: bool = False
    failures: int = 0


class Leases:
    """All leases of one client, at most one on each model; threads may share it.

    Args:
        on_change: Is called when `wait` may have become shorter.
        now: A clock in seconds that does not go back.
    """

    def __init__(
        self, on_change: Callable[[], object], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_change = on_change
        self._now = now
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}

    def take(self, request: pb.LoadModelRequest, response: pb.LoadModelResponse) -> str:
        """Holds the lease that came with a model.

        Args:
            request: What gave it.
            response: The model and the lease.

        Returns:
            The id of the lease that it replaces, for the caller to release, or "".
        """
        held = self._fresh(response.model.handle, request, response.lease)
        with self._lock:
            old = self._held.get(held.handle)
            self._held[held.handle] = held
        self._on_change()
        return old.lease.id if old and not old.lost else ""

    def of(self, handle: str) -> Lease | None:
        """Gives the lease on a model as it is now; None if there is none, or it has expired."""
        held, now = self._held.get(handle), self._now()
        if held is None or held.lost or held.expires <= now:
            return None
        return replace(held.lease, seconds_left=held.expires - now)

    def wait(self) -> float | None:
        """Says in how many seconds the next step is due; None if no lease is held."""
        with self._lock:
            due = min((held.due for held in self._held.values()), default=None)
        return None if due is None else max(due - self._now(), 0.0)

    def due(self, *, lost: bool) -> list[Held]:
        """Lists what is due.

        Args:
            lost: Whether to list leases to load again, or those to renew.

        Returns:
            The leases.
        """
        now = self._now()
        with self._lock:
            return [held for held in self._held.values() if held.due <= now and held.lost is lost]

    def renewed(self, held: Held, lease: pb.Lease) -> None:
        """Notes that a lease was renewed."""
        self._recovered(held, self._fresh(held.handle, held.request, lease))

    def reloaded(self, held: Held, response: pb.LoadModelResponse) -> str:
        """Notes that the model of a lost lease was loaded again.

        Args:
            held: The lost lease.
            response: The model and the new lease.

        Returns:
            The id of the new lease, for the caller to release, if nobody wants it; else "".
        """
        if response.model.handle == held.handle and response.HasField("lease"):
            fresh = self._fresh(held.handle, held.request, response.lease)
            return "" if self._recovered(held, fresh) else response.lease.id
        if self._swap(held, None):
            _log.warning(
                "%s was loaded again for its lease, but is now %s: its source has changed. "
                "The lease is given up; load the model again",
                held.handle,
                response.model.handle,
            )
        return response.lease.id

    def failed(self, held: Held, error: Error) -> None:
        """Decides what follows a failed step: the same after a pause, a new load, or the end.

        Args:
            held: The lease.
            error: Why the step failed; is logged unless the step before failed as well.
        """
        following: Held | None
        if error.details.get("ended") == "unloaded":
            told, following = "the lease on %s is over (%s)", None
        elif error.reason == "LEASE_UNKNOWN" and not held.lost:
            told = "the lease on %s is gone (%s); the model is loaded again"
            following = replace(held, lost=True, due=self._now(), failures=0)
        else:
            told = "" if held.failures else "the lease on %s is not renewed (%s); trying again"
            longest = min(_third(held.lease.seconds), MAX_PAUSE)
            pause = min(FIRST_PAUSE * 2.0 ** min(held.failures, 20), longest)
            following = replace(held, due=self._now() + pause, failures=held.failures + 1)
        if self._swap(held, following) and told:
            _log.warning(told, held.handle, error)

    @contextmanager
    def ending(self, handle: str) -> Iterator[str]:
        """Forgets a lease while its model is unloaded, and for good unless that is refused.

        Args:
            handle: The model.

        Yields:
            The id of the lease, or "" if none is held.
        """
        with self._lock:
            held = self._held.pop(handle, None)
        try:
            yield held.lease.id if held and not held.lost else ""
        except Error as error:
            if held and error.reason in _REFUSALS:
                with self._lock:
                    self._held.setdefault(handle, held)
                self._on_change()
            raise

    def drop(self, handle: str | None = None) -> list[str]:
        """Forgets the lease on a model, or all.

        Args:
            handle: The model; None for all.

        Returns:
            The ids of the leases, for the caller to release.
        """
        with self._lock:
            handles = list(self._held) if handle is None else [handle]
            dropped = [self._held.pop(handle) for handle in handles if handle in self._held]
        return [held.lease.id for held in dropped if not held.lost]

    def _fresh(self, handle: str, request: pb.LoadModelRequest, message: pb.Lease) -> Held:
        lease, now = decode.lease(message), self._now()
        due = now + _third(lease.seconds)
        return Held(handle, request, lease, now + lease.seconds_left, due)

    def _recovered(self, held: Held, fresh: Held) -> bool:
        swapped = self._swap(held, fresh)
        if swapped and (held.lost or held.failures):
            _log.info("the lease on %s is held again", held.handle)
        return swapped

    def _swap(self, held: Held, following: Held | None) -> bool:
        """Puts one in the place of another; not if that was released or replaced meanwhile."""
        with self._lock:
            if self._held.get(held.handle) is not held:
                return False
            if following:
                self._held[held.handle] = following
            else:
                del self._held[held.handle]
            return True


def _third(seconds: float) -> float:
    return max(seconds / 3, MIN_PAUSE)
