"""One server an accelerator, and one a state: who comes second is told who holds it."""

from __future__ import annotations

import glob
import os
import sys
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from moorage_server.errors import Reason, ServerError

#: The device files of TPUs (older and newer drivers) and GPUs.
DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*")


def hold_accelerators(folder: Path | None = None) -> list[FileLock]:
    """Takes this host's accelerators for this process, for as long as the locks are kept.

    To be called before anything touches them: the runtime of a second process would only fail, or
    wait. CPU devices are not held: several servers may run on them side by side. A lock ends with
    its process, however that ends.

    Args:
        folder: Where the locks are; the system's folder for temporary files by default, which the
            processes of a host share.

    Raises:
        ServerError: ACCELERATOR_BUSY with the holder's pid and command.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    folder = folder or Path(tempfile.gettempdir())
    names = sorted(name for pattern in DEVICES for name in glob.glob(pattern))
    return [_hold(name, folder) for name in names]


def hold_state(folder: Path) -> FileLock:
    """Takes a server's state for this process, as long as the lock is kept.

    Raises:
        ValueError: Another process has it; with its pid and command.
        OSError: It is no folder that can be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _lock(folder / "server.lock", f"state {folder}", "or give this one a state of its own")


def _hold(device: str, folder: Path) -> FileLock:
    path = folder / f"moorage-{device.strip('/').replace('/', '-')}.lock"
    try:
        return _lock(path, device, "or use it")
    except ValueError as error:
        raise ServerError(Reason.ACCELERATOR_BUSY, str(error)) from None


def _lock(path: Path, what: str, instead: str) -> FileLock:
    lock, holder = FileLock(path, mode=0o666), path.with_suffix(".holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        told = f"{what} is held by {_read(holder)}: stop that server, {instead}"
        raise ValueError(told) from None
    holder.write_text(f"process {os.getpid()}: {' '.join(sys.orig_argv)}")
    return lock


def _read(holder: Path) -> str:
    try:
        return holder.read_text()
    except OSError:
        return "another process"
