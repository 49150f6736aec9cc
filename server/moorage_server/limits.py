"""What clients may have, each and all together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moorage_server.errors import Reason, ServerError

_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Limits:
    """How much there may be of everything; of `client_...`, for one client.

    Attributes:
        requests: Requests that are under way.
        client_requests: The same.
        client_tokens: Tokens that wait for the devices, padding included.
        connections: Connections that are open.
        models: Models that are loaded or on their way.
        client_models: Those that it asked for first; and its looks into sources.
        leases: Leases that have not ended.
        client_leases: The same.
    """

    requests: int = 4096
    client_requests: int = 1024
    client_tokens: int = 1 << 20
    connections: int = 1024
    models: int = 64
    client_models: int = 64
    leases: int = 1024
    client_leases: int = 256

    def check(self, name: str, count: int, wanted: int = 1, what: str = "") -> None:
        """Refuses what would be too much.

        Args:
            name: Which limit, as the attribute is called.
            count: How much there is.
            wanted: How much more is asked for.
            what: What that is, if not what the limit is called.

        Raises:
            ServerError: LIMIT_EXCEEDED, with the limit.
        """
        limit: int = getattr(self, name)
        if count + wanted > limit:
            whose, named = _words(name)
            raise ServerError(
                Reason.LIMIT_EXCEEDED,
                f"{count} {what or named} of {whose} and {wanted} more are over max_{name}, "
                f"{limit}: try again when some have ended",
                retry_after=_RETRY_SECONDS,
                limit=f"max_{name}",
                value=str(limit),
            )


def _words(name: str) -> tuple[str, str]:
    of_one = name.removeprefix("client_")
    return ("all clients" if of_one == name else "this client"), of_one


class Gate:
    """Counts the requests that are under way.

    Attributes:
        limits: How many there may be.
        requests: How many there are.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self._by_client: Counter[str] = Counter()

    @contextmanager
    def passing(self, client: str) -> Iterator[None]:
        """Counts a request of a client while it runs.

        Raises:
            ServerError: LIMIT_EXCEEDED.
        """
        self.limits.check("requests", self.requests)
        self.limits.check("client_requests", self._by_client[client])
        self.requests += 1
        self._by_client[client] += 1
        try:
            yield
        finally:
            self.requests -= 1
            self._by_client[client] -= 1
            if not self._by_client[client]:
                del self._by_client[client]
