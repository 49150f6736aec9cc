"""Whether the server is about to stop, and takes no more work."""

from __future__ import annotations

from dataclasses import dataclass

from moorage_server.errors import Reason, ServerError

#: When its successor may be there, in seconds.
RETRY_SECONDS = 5.0


@dataclass
class Draining:
    """Whether the server is about to stop.

    Attributes:
        started: Whether it is.
    """

    started: bool = False

    def check(self) -> None:
        """Raises SERVER_DRAINING if the server is about to stop."""
        if self.started:
            raise ServerError(
                Reason.SERVER_DRAINING,
                "the server is stopping; the one after it may be there in some seconds",
                retry_after=RETRY_SECONDS,
            )
