"""The progress of one file's download, and its end when the load is over."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor

if TYPE_CHECKING:
    Tqdm = tqdm[Any]
else:
    Tqdm = tqdm  # takes no type parameters at run time

T = TypeVar("T")

_POLL_SECONDS = 0.1


class FileProgress:
    """Counts the bytes of one file towards the stage `fetch`, from nothing to its size.

    Attributes:
        monitor: Told of the bytes.
        over: Set once the load has failed or was cancelled: then the file is given up.
        size: Bytes of the file.
    """

    def __init__(self, monitor: LoadMonitor, over: threading.Event, size: int) -> None:
        self.monitor, self.over, self.size = monitor, over, size
        self._done = 0

    def advance(self, count: int) -> None:
        """Counts bytes; a negative count takes some back.

        Raises:
            ModelError: LOAD_CANCELLED.
        """
        self.check()
        count = max(min(count, self.size - self._done), -self._done)
        self._done += count
        self.monitor.advance("fetch", count)

    def restart(self) -> None:
        """Takes all bytes back."""
        self.advance(-self._done)

    def finish(self) -> None:
        """Counts the bytes that nobody told of: the file was there."""
        self.advance(self.size - self._done)

    def check(self) -> None:
        """Raises LOAD_CANCELLED once the load is over."""
        self.monitor.check()
        if self.over.is_set():
            raise ModelError(Reason.LOAD_CANCELLED, "the load has failed")

    def wait(self, future: Future[T]) -> T:
        """Waits for another thread as long as the load goes on: then one that stalls is left."""
        while not future.done():
            self.check()
            wait([future], _POLL_SECONDS)
        return future.result()

    def bar(self) -> type[Tqdm]:
        """A class of silent progress bars through which the hub's client tells of its bytes."""
        return type("Bar", (_Bar,), {"progress": self})


class _Bar(Tqdm):
    progress: FileProgress
    monitor_interval = 0  # otherwise tqdm starts a thread a class, which never ends

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})
        self._thread = threading.current_thread()

    def update(self, n: int | float | None = 1) -> bool | None:
        try:
            self.progress.advance(int(n or 0))
        except ModelError:
            # hf_xet calls from a thread of its own, and only prints what is raised there.
            if threading.current_thread() is self._thread:
                raise
        return None

    # With these two, hf_xet's bytes on the network are told here and not to a second bar.
    def update_transfer(self, n: int | float | None = 1) -> None:
        pass

    def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
        pass
