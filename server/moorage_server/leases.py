"""Leases: promises that a model is not evicted, for a time, to clients with a name."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from moorage_server.errors import Reason, ServerError

#: A lease is taken or renewed for this long at the most, in seconds.
MAX_SECONDS = 24 * 3600.0

#: Leases of unloaded models whose holders are told so.
_REMEMBERED = 1024


@dataclass(frozen=True)
class Lease:
    """One client's hold on one model.

    Attributes:
        id: What renews and releases it; only its holder knows it.
        handle: The model.
        client: Who holds it, as the client calls itself.
        seconds: How long it lasts unless it is renewed.
        expires: When it ends, on the clock of the table.
        holder: Who holds it, as the server knows callers.
    """

    id: str
    handle: str
    client: str
    seconds: float
    expires: float
    holder: str = ""


class LeaseTable:
    """Every lease that has not ended.

    Attributes:
        now: The clock, in seconds; any that does not go back.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self._leases: dict[str, Lease] = {}
        self._dropped: deque[str] = deque(maxlen=_REMEMBERED)
        self._expired: set[str] = set()

    def take(self, handle: str, client: str, seconds: float, holder: str = "") -> Lease:
        """Gives a client a lease on a model.

        Raises:
            ServerError: INVALID_REQUEST for a duration that cannot be.
        """
        check_seconds(seconds)
        lease = Lease(secrets.token_hex(16), handle, client, seconds, self.now() + seconds, holder)
        self._leases[lease.id] = lease
        return lease

    def restore(self, lease: Lease) -> None:
        """Takes over a lease of a server that is gone."""
        self._leases[lease.id] = lease

    def all(self) -> list[Lease]:
        """Every lease, the oldest first."""
        self._expire()
        return list(self._leases.values())

    def renew(self, lease_id: str) -> Lease:
        """Lets a lease last as long again as it was taken for, from now on.

        Raises:
            ServerError: LEASE_UNKNOWN.
        """
        lease = self._known(lease_id)
        renewed = replace(lease, expires=self.now() + lease.seconds)
        self._leases[lease_id] = renewed
        return renewed

    def release(self, lease_id: str) -> Lease:
        """Ends a lease.

        Raises:
            ServerError: LEASE_UNKNOWN.
        """
        self._known(lease_id)
        return self._leases.pop(lease_id)

    def of(self, handle: str) -> list[Lease]:
        """The leases on a model, the oldest first."""
        self._expire()
        return [lease for lease in self._leases.values() if lease.handle == handle]

    def drop(self, handle: str, *, unloaded: bool) -> None:
        """Ends all leases on a model that is gone.

        Args:
            handle: The model.
            unloaded: Whether somebody wanted that, which their holders are told then; else they
                may load it again.
        """
        if unloaded:
            self._dropped.extend(x.id for x in self._leases.values() if x.handle == handle)
        self._leases = {i: lease for i, lease in self._leases.items() if lease.handle != handle}

    def take_expired(self) -> set[str]:
        """The models on which leases have expired since this was last asked."""
        self._expire()
        expired, self._expired = self._expired, set()
        return expired

    def seconds_left(self, lease: Lease) -> float:
        """How long a lease lasts if it is not renewed."""
        return max(0.0, lease.expires - self.now())

    def describe(self, lease: Lease) -> str:
        """Who holds a lease, and for how long."""
        return f"{lease.client or 'a client'} ({self.seconds_left(lease):.0f} s left)"

    def _known(self, lease_id: str) -> Lease:
        self._expire()
        if lease := self._leases.get(lease_id):
            return lease
        if lease_id in self._dropped:
            raise ServerError(
                Reason.LEASE_UNKNOWN,
                "the model of this lease was unloaded: load it again if it is still wanted",
                ended="unloaded",
            )
        raise ServerError(
            Reason.LEASE_UNKNOWN,
            "this lease has expired or was released, or the server was started anew: load the "
            "model again, which takes a new one",
        )

    def _expire(self) -> None:
        now = self.now()
        self._expired |= {x.handle for x in self._leases.values() if x.expires <= now}
        self._leases = {i: lease for i, lease in self._leases.items() if lease.expires > now}


def check_seconds(seconds: float) -> None:
    """Refuses a duration that no lease can have.

    Raises:
        ServerError: INVALID_REQUEST.
    """
    if not 0 < seconds <= MAX_SECONDS:
        raise ServerError(
            Reason.INVALID_REQUEST,
            f"a lease of {seconds:g} s: wanted more than 0 and at most {MAX_SECONDS:g}; it can be "
            "renewed as often as needed",
        )
