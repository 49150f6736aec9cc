"""One request of a forward pass over as many calls as it takes: when, and what for."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

from moorage.assembly import Assembly
from moorage.errors import Cancelled, DataLoss, DeadlineExceeded, Error, Unavailable
from moorage.scores import Scores
from moorage.transport import Resumption
from moorage.v1 import moorage_pb2 as pb

PATIENCE = 120.0
"""Seconds without any answer after which a request is given up."""

DAMAGES = 3
"""How often bytes that came damaged are asked for again."""

JITTER = 0.2
"""By how much of itself a pause that the server asks for is lengthened at the most."""

BUSY = frozenset({"QUEUE_FULL", "LIMIT_EXCEEDED", "SERVER_DRAINING"})
"""The reasons after which a request is sent again, once the server has said when."""


class ForwardWatch:
    """Follows one request until its answer is complete; does no I/O.

    Args:
        request: The request.
        deadline: When it is given up, on the clock of `now`.
        answered: Whether the server is known to have answered before: a server that never did is
            not waited for.
        now: A clock in seconds that does not go back.
        chance: Gives a number from 0 to 1.
    """

    def __init__(
        self,
        request: pb.ForwardRequest,
        deadline: float = math.inf,
        *,
        answered: bool = False,
        now: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._assembly = Assembly(request)
        self._deadline = deadline
        self._now = now
        self._chance = chance
        # gRPC cancels what a server that stops has not taken yet. Whoever cancels a pass ends it.
        broken = (Unavailable, Cancelled)
        self._resumption = Resumption(math.inf, now, PATIENCE, answered, broken)
        self._damages_left = DAMAGES

    @property
    def complete(self) -> bool:
        """Whether every byte of the answer has come."""
        return self._assembly.complete

    def begin(self) -> tuple[pb.ForwardRequest, float | None]:
        """Begins a call.

        Returns:
            The request for what has not come yet, and the seconds that are left for it, or None
            for any time.

        Raises:
            DeadlineExceeded: None is left: gRPC would let a quick server answer all the same.
        """
        left = self._deadline - self._now()
        if left <= 0:
            raise DeadlineExceeded(
                "the time of the forward pass was over before it could be sent; give the call, or "
                "connect(), a longer timeout"
            )
        return self._assembly.begin(), None if math.isinf(left) else left

    def see(self, response: pb.ForwardResponse) -> None:
        """Takes the next message.

        Args:
            response: Progress, the header, or a chunk.

        Raises:
            Error: The message cannot be used; `pause` decides what follows.
        """
        self._resumption.answered()
        self._assembly.add(response)

    def pause(self, error: Error) -> float:
        """Decides what follows a failed call.

        Args:
            error: Why it failed.

        Returns:
            Seconds to wait; the request is made again then, unless its answer is complete.

        Raises:
            Error: `error` itself, if the request is to be given up.
        """
        seconds = self._pause(error)
        if not self.complete and self._now() + seconds >= self._deadline:
            raise error
        return seconds

    def scores(self) -> Scores:
        """Gives the scores, once the call has ended well.

        Raises:
            DataLoss: The header or some bytes are missing.
        """
        return self._assembly.scores()

    def _pause(self, error: Error) -> float:
        if error.reason in BUSY and error.retry_after is not None:
            self._resumption.answered()
            return error.retry_after * (1.0 + JITTER * self._chance())
        if isinstance(error, DataLoss) and error.retry_after is not None and self._damages_left:
            self._damages_left -= 1
            return error.retry_after
        seconds = self._resumption.pause(error)
        return 0.0 if self.complete else seconds
