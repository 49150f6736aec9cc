"""What a load is measured against: how fast the files can be read, warm or cold, and memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

_PAGE = 4096
#: Bytes a request, threads, flags.
_WARM = {"one thread": (4 << 20, 1, 0), "two threads": (4 << 20, 2, 0)}
_COLD = {"O_DIRECT": (8 << 20, 4, os.O_DIRECT)}


class ReadLimit:
    """Reads files into memory that is there already, in huge pages, and is used every time."""

    def __init__(self, folder: Path, cold: bool) -> None:
        self._files = files(folder)
        self._ways = _COLD if cold else _WARM
        self._starts = np.cumsum([0, *(_whole_pages(f.stat().st_size) for f in self._files)])
        self._memory = _touched(int(self._starts[-1]))

    def seconds(self) -> dict[str, float]:
        """The time to read all the files once, by the way of reading."""
        return {name: self._read(*way) for name, way in self._ways.items()}

    def _read(self, request: int, threads: int, flags: int) -> float:
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(threads))
            pieces = []
            for start, file in zip(self._starts, self._files, strict=False):
                descriptor = os.open(file, os.O_RDONLY | flags)
                stack.callback(os.close, descriptor)
                size = file.stat().st_size
                pieces += [(descriptor, o, int(start), request) for o in range(0, size, request)]
            begin = time.perf_counter()
            done = sum(pool.map(self._piece, pieces))
            seconds = time.perf_counter() - begin
        if done != sum(file.stat().st_size for file in self._files):
            raise SystemExit(f"{done} bytes were read, which is not all: do the files change?")
        return seconds

    def _piece(self, piece: tuple[int, int, int, int]) -> int:
        descriptor, offset, start, request = piece
        size = min(request, _whole_pages(os.fstat(descriptor).st_size) - offset)
        with memoryview(self._memory) as view:
            return os.preadv(descriptor, [view[start + offset :][:size]], offset)


def back_memory(folder: Path) -> None:
    """Touches twice the memory of the files, and gives it back to the system.

    The host of a virtual machine may take free memory away, and is slow to find it again: that is
    not to be part of the time that a load takes.
    """
    _touched(2 * sum(file.stat().st_size for file in files(folder))).close()


def _touched(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, max(_PAGE, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(memory, np.uint8)[::_PAGE] = 1
    return memory


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def files(folder: Path) -> list[Path]:
    """All that a checkpoint consists of."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def warm(folder: Path) -> None:
    """Reads all files into the page cache, and leaves no memory behind."""
    with mmap.mmap(-1, 4 << 20) as memory:
        for path in files(folder):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(memory):
                    pass


def evict(folder: Path) -> None:
    """Drops all files from the page cache, and makes sure that they are gone."""
    for path in files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if (resident := _resident(path)) > 0.01:
            raise SystemExit(
                f"{resident:.0%} of {path} stay in the page cache; put the checkpoints where "
                "POSIX_FADV_DONTNEED works (no tmpfs), on files that no other process maps"
            )


def _resident(path: Path) -> float:
    """The part of a file that the page cache holds, as mincore tells the file's owner."""
    size = path.stat().st_size
    if size == 0:
        return 0.0
    pages = np.zeros(-(-size // _PAGE), np.uint8)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        arguments = [ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)]
        failed = ctypes.CDLL(None).mincore(*arguments, ctypes.c_void_p(pages.ctypes.data))
        del view
    if failed:
        raise SystemExit(f"mincore fails on {path}: whether it is cold is not known")
    return float((pages & 1).mean())


@contextmanager
def peak_growth(every: float = 0.005) -> Iterator[dict[str, int]]:
    """Gives a dict that says in the end by how many bytes memory grew at the most.

    `anonymous` is RssAnon, sampled; `resident` is the kernel's own mark of all resident memory, in
    which mapped files count as well.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from now
    baseline, resident = _status("RssAnon"), _status("VmRSS")
    peak, stop, growth = baseline, threading.Event(), dict[str, int]()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(every):
            peak = max(peak, _status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield growth
    finally:
        stop.set()
        thread.join()
    growth["anonymous"] = max(peak, _status("RssAnon")) - baseline
    growth["resident"] = _status("VmHWM") - resident


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024
