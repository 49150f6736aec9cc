"""Host memory that models are read into, and that is used again when they are gone.

Fresh memory costs more than reading into it: the kernel clears each page at its first touch. So
the memory is in huge pages, and what a model leaves behind is kept, up to a limit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections import deque
from contextlib import suppress

import numpy as np

_PAGE = mmap.PAGESIZE
_HUGE_PAGE = 2 << 20
#: Smaller arrays come from numpy: a mapping each would waste a page and its set-up.
_MIN_BYTES = 256 << 10
_ALIGNMENT = 64  # what XLA on CPU wants of memory that it uses without a copy

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _Slot:
    """Some memory, which everything made of it refers to; its end is what frees the memory."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
        }


class Arena:
    """Hands out memory, and takes it back once nothing refers to it any more.

    What refers to it are numpy arrays and, on CPU devices, jax arrays that were made of them
    without a copy. A finalizer on an array would come too early, since jax keeps none of them but
    what they are made of: hence an object a slot.

    Attributes:
        limit: Bytes that are kept for models to come; what is above goes back to the system.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._free: list[tuple[int, int]] = []  # address and bytes, by address
        self._ended: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    @property
    def kept(self) -> int:
        """Bytes that wait to be used again."""
        with self._lock:
            return sum(size for _, size in self._free)

    def allocate(self, nbytes: int) -> np.ndarray:
        """Memory for an array, aligned for XLA, of any content.

        Args:
            nbytes: Its size.

        Returns:
            `uint8[nbytes]`.

        Raises:
            MemoryError: The system has no more.
        """
        if nbytes < _MIN_BYTES:
            whole = np.empty(nbytes + _ALIGNMENT, np.uint8)
            start = -whole.ctypes.data % _ALIGNMENT
            return whole[start : start + nbytes]
        size = -(-nbytes // _PAGE) * _PAGE
        self._collect()
        with self._lock:
            address = self._take(size)
        address = address or _map(size)
        slot = _Slot(address, nbytes)
        ends = weakref.finalize(slot, self._end, address, size)
        ends.atexit = False  # devices may still compute when the interpreter ends
        self._collect()
        return np.asarray(slot)

    def _end(self, address: int, size: int) -> None:
        """Takes a slot's memory back. A slot may end anywhere, even in a thread under the lock."""
        self._ended.append((address, size))
        self._collect()

    def _collect(self) -> None:
        while self._ended and self._lock.acquire(blocking=False):
            try:
                with suppress(IndexError):
                    while True:
                        self._free.append(self._ended.popleft())
                self._free = _joined(self._free)
                self._trim()
            finally:
                self._lock.release()

    def _take(self, size: int) -> int:
        """The address of the smallest free run that is long enough, or 0."""
        fits = [(free, address) for address, free in self._free if free >= size]
        if not fits:
            return 0
        free, address = min(fits)
        self._free.remove((address, free))
        if free > size:
            self._free.append((address + size, free - size))
        return address

    def _trim(self) -> None:
        excess = sum(size for _, size in self._free) - self.limit
        while excess > 0:
            address, size = self._free.pop()
            cut = min(size, -(-excess // _PAGE) * _PAGE)
            _LIBC.munmap(address + size - cut, cut)
            if size > cut:
                self._free.append((address, size - cut))
            excess -= cut


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Free runs by address, neighbours made one."""
    joined: list[tuple[int, int]] = []
    for address, size in sorted(runs):
        if joined and sum(joined[-1]) == address:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((address, size))
    return joined


def _map(size: int) -> int:
    """Maps fresh memory that begins on a huge page."""
    spare = _HUGE_PAGE if size >= _HUGE_PAGE else 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _LIBC.mmap(None, size + spare, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if start == ctypes.c_void_p(-1).value:
        raise MemoryError(f"no memory for {size} bytes: {os.strerror(ctypes.get_errno())}")
    skipped = -start % _HUGE_PAGE if spare else 0
    for address, cut in ((start, skipped), (start + skipped + size, spare - skipped)):
        if cut:
            _LIBC.munmap(address, cut)
    _LIBC.madvise(start + skipped, size, mmap.MADV_HUGEPAGE)  # a wish: without it, it works too
    return int(start) + skipped
