"""Reads a checkpoint's files from their hub by ranges, with no copy on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from moorage_models.monitor import LoadMonitor
from moorage_models.reading import READ_BYTES, spread
from moorage_models.sources import Repository

_POLL_SECONDS = 0.1


class RangedFiles:
    """The files of a repository, for one load.

    A repository is at one commit, version or set of generations: a file that is replaced meanwhile
    is refused, not mixed. No digest is compared, since nobody need read a whole file.

    Attributes:
        threads: Ranges that are asked for at a time.
    """

    threads = 8

    def __init__(self, repository: Repository, monitor: LoadMonitor) -> None:
        self._repository = repository
        self._monitor = monitor
        self._pool = ThreadPoolExecutor(self.threads, "stream")

    def __enter__(self) -> RangedFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def read(self, name: str, offset: int, target: np.ndarray) -> None:
        """Fills an array with the bytes of a file from `offset` on."""
        for start in range(0, len(target), READ_BYTES):
            part = target[start : start + READ_BYTES]
            part[:] = self.lend(name, offset + start, len(part))

    def scatter(self, name: str, offset: int, groups: Sequence[Sequence[np.ndarray]]) -> None:
        """Fills arrays from one run of a file."""
        nbytes = sum(array.size for group in groups for array in group)
        spread(self.lend(name, offset, nbytes), groups)

    def lend(self, name: str, offset: int, nbytes: int) -> np.ndarray:
        """The bytes of a file from `offset` on; a request that stalls ends with the load."""
        request = self._pool.submit(self._repository.request, name, offset, offset + nbytes)
        while not request.done():
            self._monitor.check()
            wait([request], _POLL_SECONDS)
        return np.frombuffer(request.result(), np.uint8)
