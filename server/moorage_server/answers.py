"""Work and answers that are kept for callers whose connection broke. Pure: takes the time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from moorage_server.errors import Reason, ServerError

#: For how long a caller may come back.
RETENTION_SECONDS = 60.0

#: How many bytes are kept for callers that are gone, in all.
RETAINED_BYTES = 256 << 20

#: How long the id of a request may be.
MAX_ID_LENGTH = 128

T = TypeVar("T")


@dataclass
class _Entry(Generic[T]):
    value: T
    fingerprint: bytes
    nbytes: int = 0
    left: float = 0.0  # when the last caller left


class AnswerTable(Generic[T]):
    """Finds again what was begun for a request, by the id that the caller gave it.

    Attributes:
        capacity: How many bytes are kept for callers that are gone.
        nbytes: How many are.
    """

    def __init__(self, capacity: int = RETAINED_BYTES) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._waited_for: dict[str, _Entry[T]] = {}
        self._kept: dict[str, _Entry[T]] = {}  # those whose callers left last are last

    def get(self, request_id: str, fingerprint: bytes) -> T | None:
        """What is kept for a request; None if nothing is.

        Args:
            request_id: Its id; empty for none.
            fingerprint: A digest of the request.

        Raises:
            ServerError: INVALID_REQUEST if the id is too long, or another request came under it.
        """
        if len(request_id) > MAX_ID_LENGTH:
            raise ServerError(
                Reason.INVALID_REQUEST,
                f"request_id has {len(request_id)} characters; it may have {MAX_ID_LENGTH}",
                limit=str(MAX_ID_LENGTH),
            )
        entry = self._waited_for.get(request_id) or self._kept.get(request_id)
        if entry and entry.fingerprint != fingerprint:
            raise ServerError(
                Reason.INVALID_REQUEST,
                f"request_id {request_id!r} was given to another request; give each its own",
            )
        return entry.value if entry else None

    def add(self, request_id: str, fingerprint: bytes, value: T) -> None:
        """Keeps something for a request that somebody waits for, if it has an id."""
        if request_id:
            self._waited_for[request_id] = _Entry(value, fingerprint)

    def back(self, request_id: str) -> None:
        """Takes note that a caller has come."""
        if entry := self._kept.pop(request_id, None):
            self._waited_for[request_id] = entry
            self.nbytes -= entry.nbytes

    def leave(self, request_id: str, nbytes: int, now: float) -> None:
        """Takes note that the last caller has gone; to make room, drops who left before."""
        entry = self._waited_for.pop(request_id, None)
        if entry is None or nbytes > self.capacity:
            return
        entry.nbytes, entry.left = nbytes, now
        self._kept[request_id] = entry
        self.nbytes += nbytes
        while self.nbytes > self.capacity:
            self.drop(next(iter(self._kept)))

    def expire(self, now: float) -> None:
        """Drops what no caller has come back for."""
        while self._kept:
            name, entry = next(iter(self._kept.items()))
            if now - entry.left < RETENTION_SECONDS:
                break
            self.drop(name)

    def drop(self, request_id: str) -> None:
        """Forgets a request that nobody waits for, if it is there."""
        if entry := self._kept.pop(request_id, None):
            self.nbytes -= entry.nbytes
