"""Rows that wait for the devices, and which of them run next. Pure: no clock, no threads."""

from __future__ import annotations

import heapq
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from moorage_server.engine import Bucket
from moorage_server.jobs import Job, Shape
from moorage_server.scoring import Piece, bucket_for

#: How long a model's rows take in a bucket, by its handle; None if that is not known yet.
Seconds = Callable[[str, Bucket], float | None]


@dataclass(eq=False)
class _Client:
    """Its requests, with the number of their arrival; and their turns by shape, as heaps.

    Requests run in the order in which they would end if all had equal shares (Friedman and
    Henderson 2003): none is half done for long, and no short one is stuck behind a long one.
    """

    served: float
    share: float = 0.0  # what each request would have had, if all had equal shares
    tokens: int = 0
    jobs: dict[Job, int] = field(default_factory=dict)
    turns: dict[Shape, list[tuple[float, int, Job]]] = field(default_factory=dict)

    def add(self, job: Job, number: int) -> None:
        self.jobs[job] = number
        job.turn = self.share + job.tokens
        for length in job.waiting:
            turns = self.turns.setdefault(job.shape(length), [])
            heapq.heappush(turns, (job.turn, number, job))

    def count(self, tokens: int) -> None:
        """Takes note that one of its rows runs."""
        self.served += tokens
        self.share += tokens / len(self.jobs)

    def first(self) -> Job | None:
        """The request whose turn it is."""
        firsts = [job for shape in list(self.turns) if (job := self.first_of(shape))]
        return min(firsts, key=lambda job: (job.turn, self.jobs[job]), default=None)

    def first_of(self, shape: Shape) -> Job | None:
        """The one whose turn it is, of those that have rows of a shape."""
        turns = self.turns.get(shape, [])
        while turns:
            _, number, job = turns[0]
            if self.jobs.get(job) == number and shape[1] in job.waiting:
                return job
            heapq.heappop(turns)
        self.turns.pop(shape, None)
        return None


@dataclass(frozen=True)
class Pick:
    """Rows to run together.

    Attributes:
        bucket: The shape to run in.
        jobs: The request of each row.
        pieces: The rows.
    """

    bucket: Bucket
    jobs: tuple[Job, ...]
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """How many tokens that is, as the queue counts them."""
        return len(self.pieces) * self.bucket.length


class FairQueue:
    """Lets clients have equal shares of what runs.

    The next row is of the client that was served least; rows of others that fit beside it run with
    it, unless their client is a batch ahead. Who comes begins with what the least served has had,
    or the most served if nobody waits, or goes on where it was (start-time fair queuing: Goyal, Vin
    and Cheng 1996).

    Attributes:
        capacity: How many tokens may wait, padding included; the last that comes may be over it.
        tokens: How many do.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = 0
        self._clients: dict[str, _Client] = {}
        self._left: dict[str, float] = {}  # what clients were served that have nothing waiting
        self._most = 0.0  # what the most served client ever had
        self._numbers = itertools.count()

    def tokens_of(self, client: str) -> int:
        """The tokens that wait for one client, padding included."""
        return self._clients[client].tokens if client in self._clients else 0

    def ahead_of(self, job: Job) -> int:
        """How many tokens run, about, until a request is done that comes now."""
        client = self._clients.get(job.client)
        earlier, share = (client.jobs, client.share) if client else ({}, 0.0)
        turn = share + job.tokens
        own = job.tokens + sum(other.tokens for other in earlier if other.turn <= turn)
        others = (c.tokens for c in self._clients.values() if c is not client)
        return own + sum(min(tokens, own) for tokens in others)

    def excess(self, client: str, tokens: int) -> int:
        """How many tokens have to go before a request of so many may come; see `excess`.

        So the queue holds less than its capacity and one request; what that takes of memory is
        bounded by the size of a message, and by what answers may take.
        """
        return excess(self.tokens, self.tokens_of(client), tokens, self.capacity)

    def add(self, job: Job) -> None:
        """Takes a request in, or again one that was removed."""
        if not job.waiting:
            return
        if job.client not in self._clients:
            least = min((c.served for c in self._clients.values()), default=self._most)
            self._left = {name: had for name, had in self._left.items() if had > least}
            self._clients[job.client] = _Client(self._left.pop(job.client, least))
        client = self._clients[job.client]
        client.add(job, next(self._numbers))
        self._count(client, job.tokens)

    def remove(self, job: Job) -> None:
        """Takes a request out, if it is there."""
        client = self._clients.get(job.client)
        if client is None or job not in client.jobs:
            return
        del client.jobs[job]
        self._count(client, -job.tokens)
        if not client.jobs:
            self._left[job.client] = client.served
            del self._clients[job.client]

    def pick(self, seconds: Seconds = lambda *_: None) -> Pick | None:
        """Takes out the rows that run next; None if nothing waits.

        They run in the smallest bucket that holds them, or the largest there is; if it is known how
        long that takes, in the one of those known that gets through the most rows in a second.
        """
        client = min(self._clients.values(), key=lambda client: client.served, default=None)
        first = client.first() if client else None
        if client is None or first is None:
            return None
        shape = first.shape(max(first.waiting))
        most = self._quickest(shape, first.buckets, seconds).rows
        jobs, pieces = [], []
        for job in self._turns(shape, client.served + most * shape[1]):
            jobs.append(job)
            pieces.append(job.take(shape[1]))
            if len(pieces) == most:
                break
        for job in jobs:
            if not job.waiting:
                self.remove(job)
        bucket = bucket_for(len(pieces), shape[1], first.buckets)
        return Pick(bucket, tuple(jobs), tuple(pieces))

    def _quickest(self, shape: Shape, buckets: Sequence[Bucket], seconds: Seconds) -> Bucket:
        handle, length, _ = shape
        largest = bucket_for(sys.maxsize, length, buckets)
        waiting = self._waiting(shape, largest.rows)
        fitting = bucket_for(waiting, length, buckets)
        rates = {
            bucket: min(waiting, bucket.rows) / taken
            for bucket in buckets
            if bucket.length == length and bucket <= fitting and (taken := seconds(handle, bucket))
        }
        return max(rates, key=rates.__getitem__) if fitting in rates else largest

    def _waiting(self, shape: Shape, enough: int) -> int:
        """How many rows of a shape wait, counted until there are enough."""
        count = 0
        for job in (job for client in self._clients.values() for job in client.jobs):
            if count >= enough:
                break
            count += len(job.waiting.get(shape[1], ())) if job.shape(shape[1]) == shape else 0
        return count

    def _turns(self, shape: Shape, limit: float) -> Iterator[Job]:
        """Whose row of a shape is next, again and again; clients wait that were served so much."""
        able = ((c.served, i, c) for i, c in enumerate(self._clients.values()) if shape in c.turns)
        turns = list(able)
        heapq.heapify(turns)
        while turns and turns[0][0] < limit:
            _, i, client = turns[0]
            if job := client.first_of(shape):
                client.count(shape[1])
                self._most = max(self._most, client.served)
                self._count(client, -shape[1])
                yield job  # whose row the caller takes
                heapq.heapreplace(turns, (client.served, i, client))
            else:
                heapq.heappop(turns)

    def _count(self, client: _Client, tokens: int) -> None:
        """Takes note of tokens that come, or go."""
        client.tokens += tokens
        self.tokens += tokens


def excess(held: int, own: int, wanted: int, capacity: int) -> int:
    """How much has to go before a client may bring something, about; 0 if it may now.

    With what it has already a client may have no more than is left free, so that there is room for
    whoever comes next (dynamic thresholds: Choudhury and Hahne 1998). With nothing, it may bring
    one request of any size as long as anything is free: the largest has to wait for no more than
    the smallest.

    Args:
        held: What all clients have.
        own: What this one has.
        wanted: What it brings.
        capacity: How much there is; the last that comes may be over it.
    """
    if not own:
        return max(0, held - capacity + 1)
    return min(held, max(0, held + wanted + own - capacity))
