"""One server an accelerator: who comes second is told who holds it."""

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


def _hold(device: str, folder: Path) -> FileLock:
    path = folder / f"moorage-{device.strip('/').replace('/', '-')}.lock"
    lock, holder = FileLock(path, mode=0o666), path.with_suffix(".holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ServerError(
            Reason.ACCELERATOR_BUSY,
            f"{device} is held by {_read(holder)}: stop that server, or use it",
        ) from None
    holder.write_text(f"process {os.getpid()}: {' '.join(sys.orig_argv)}")
    return lock


def _read(holder: Path) -> str:
    try:
        return holder.read_text()
    except OSError:
        return "another process"
