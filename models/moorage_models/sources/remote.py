"""A checkpoint on a hub: looked into by ranges, and brought here once for all processes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from filelock import FileLock, Timeout

from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_models.regular_files import read_range
from moorage_models.sources.digests import digest_of, verify
from moorage_models.sources.failures import Failures, persist
from moorage_models.sources.progress import FileProgress
from moorage_models.sources.record import Held, Records, RemoteFile
from moorage_models.sources.source import companions, ignore

T = TypeVar("T")

PAUSES = (1.0, 2.0, 4.0)  # seconds before each further attempt
_PARALLEL_FILES = 4
_POLL_SECONDS = 0.1


@runtime_checkable
class Hub(Protocol):
    """One repository on a hub, at one revision, through the hub's own client.

    Its methods raise whatever that client raises, which `failures` sorts.
    """

    @property
    def failures(self) -> Failures:
        """How its client's errors are sorted."""
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a file, by one ranged request."""
        ...

    def stated(self, name: str) -> str:
        """The digest that came with a range of a file, if lists have none; else empty."""
        ...

    def bring(self, name: str, target: Path, progress: FileProgress) -> str:
        """Downloads a whole file to `target`, going on with what an earlier attempt left there.

        Args:
            name: The file.
            target: Where it is wanted. Until this returns, nothing stands there: what is not
                whole is kept beside it, under a name that ends in `.partial` or `.incomplete`.
            progress: Told of the bytes as they arrive; what it raises ends the download.

        Returns:
            The digest that came with the bytes, for hubs whose lists have none; else empty.
        """
        ...

    def holds(self, file: RemoteFile) -> bool:
        """Whether the client has the bytes of a file already, under another name or revision."""
        ...

    def abort(self) -> None:
        """Ends what the client moves in threads of its own."""
        ...

    def sweep(self) -> None:
        """Removes what dead processes left half fetched. Called under the lock."""
        ...


@dataclass(frozen=True)
class RemoteRepository:
    """A checkpoint on a hub, at one revision.

    Attributes:
        hub: How it is asked.
        key: Names the place within the hub.
        asked: The revision that was asked for.
        revision: What that stood for: a commit, a version or a digest of generations.
        folder: Where the files are put.
        records: What was fetched and verified.
        held: The files of the revision, and what of them this machine holds.
        verify: Whether a fetch verifies again what was verified before.
        roots: Directories under which the files must really lie: those of a download path. None
            for the hub's own cache, whose files may be links to elsewhere.
        heads: The beginnings of files that were read from the hub.
        contents: SHA-256 of files that were read to verify them, but have no digest of the hub's.
    """

    hub: Hub
    key: str
    asked: str
    revision: str
    folder: Path
    records: Records
    held: Held
    verify: bool = False
    roots: tuple[Path, ...] | None = None
    heads: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    contents: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def label(self) -> str:
        """The place and the revision."""
        return f"{self.key}@{self.revision[:12]}"

    @property
    def local(self) -> Path | None:
        """The folder of a revision that was fetched before."""
        return self.folder if self.held.paths else None

    @property
    def files(self) -> Mapping[str, int]:
        """Sizes by name."""
        return {name: file.size for name, file in self.held.files.items()}

    def claim(self, name: str) -> str:
        """The hub's digest of a file, or else its revision."""
        digest = self.held.files[name].digest or self.hub.stated(name)
        return f"hub:{digest}" if digest else f"revision:{self.key}@{self.revision}"

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a file: from this machine, or by a ranged request."""
        if name in self.held.paths:
            return read_range(self.held.paths[name], name, start, stop, self.roots)
        head = self.heads.get(name, b"")
        if stop <= len(head):
            return head[start:stop]
        content = self.request(name, start, stop)
        if start == len(head):
            self.heads[name] = head + content
        return content

    def request(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a file, by a ranged request, of which nothing is kept."""

        def ask_hub() -> bytes:
            content = self.hub.read(name, start, stop)
            if len(content) != stop - start:
                raise OSError(f"{name} was answered with {len(content)} of {stop - start} bytes")
            return content

        return persist(self.hub.failures, ask_hub, self.label, PAUSES)

    @property
    def destination(self) -> Path:
        """The folder of the revision."""
        return self.folder

    def fetch(
        self, names: Sequence[str], monitor: LoadMonitor, arrived: Callable[[str], None] = ignore
    ) -> Path:
        """Downloads files and their companions, several at a time, and verifies them once.

        One process downloads; the others wait for it, and find the files there.

        Raises:
            ModelError: SOURCE_UNAVAILABLE or SOURCE_AUTH_REQUIRED as the hub answers; DISK_FULL;
                CHECKPOINT_CORRUPT if a file is not what the hub states; LOAD_CANCELLED.
        """
        wanted = {name: self.held.files[name] for name in [*companions(self.held.files), *names]}
        monitor.expect("fetch", sum(file.size for file in wanted.values()))
        if all(self._is_here(name) for name in wanted):
            monitor.advance("fetch", sum(file.size for file in wanted.values()))
            for name in wanted:
                arrived(name)
            return self.folder
        with self._alone(monitor) as downloads:
            if held := self.records.recorded(self.revision, self.folder):  # by another, meanwhile
                wanted |= {name: held.files[name] for name in wanted if name in held.files}
            self._require_space(wanted)
            wanted = self._bring_all(wanted, monitor, arrived, downloads)
            files = {**self.held.files, **wanted}
            self.records.record(self.asked, self.revision, files, self.heads)
        return self.folder

    def _is_here(self, name: str) -> bool:
        is_verified = self.held.files[name].verified_ns > 0 and not self.verify
        return is_verified and name in self.held.paths

    @contextmanager
    def _alone(self, monitor: LoadMonitor) -> Iterator[list[Future[RemoteFile]]]:
        """Holds the checkpoint's lock, which ends with the process that holds it.

        Yields:
            A list for the downloads, the last of which frees the lock: one that was given up may
            still write for a while.
        """
        downloads: list[Future[RemoteFile]] = []
        lock = self._lock(monitor)
        try:
            if lock:
                self.hub.sweep()
            yield downloads
        finally:
            if lock and all(download.done() for download in downloads):
                lock.release()
            elif lock:
                threading.Thread(target=_release, args=(lock, downloads), daemon=True).start()

    def _lock(self, monitor: LoadMonitor) -> FileLock | None:
        """Waits for the lock; None for a cache that cannot be written, which needs none."""
        path = self.records.home / "moorage" / "lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, thread_local=False)
        except OSError:
            return None
        while True:
            monitor.check()
            try:
                lock.acquire(timeout=_POLL_SECONDS)
            except Timeout:
                continue
            except OSError:
                return None
            return lock

    def _bring_all(
        self,
        wanted: Mapping[str, RemoteFile],
        monitor: LoadMonitor,
        arrived: Callable[[str], None],
        downloads: list[Future[RemoteFile]],
    ) -> dict[str, RemoteFile]:
        over = threading.Event()
        pool = ThreadPoolExecutor(_PARALLEL_FILES, "fetch")
        brought = {}
        try:
            futures = {
                pool.submit(self._bring, name, file, FileProgress(monitor, over, file.size)): name
                for name, file in wanted.items()
            }
            downloads += futures
            pending = set(futures)
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                monitor.check()
                for future in done:
                    brought[futures[future]] = future.result()
                    arrived(futures[future])
        except BaseException:
            over.set()
            self.hub.abort()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return brought

    def _bring(self, name: str, file: RemoteFile, progress: FileProgress) -> RemoteFile:
        """Downloads one file, if it is not there, and verifies it, if it was not yet."""
        path = self.folder / name

        def download() -> str:
            progress.restart()
            return self.hub.bring(name, path, progress)

        if file.verified_ns and path.exists():  # by another process, since this one has opened
            stated = ""
        else:
            stated = persist(self.hub.failures, download, self.label, PAUSES)
        verified_ns = 0 if self.verify else file.verified_ns
        file = RemoteFile(file.size, file.digest or stated, verified_ns)
        verified = verify(path, name, file, self.hub.failures.title, progress.advance)
        if self.verify and not file.digest:
            self.contents[name] = digest_of(path, name, "sha256", progress.advance)
        progress.finish()
        return verified

    def _require_space(self, wanted: Mapping[str, RemoteFile]) -> None:
        """Refuses what cannot fit, before it is fetched."""
        needed = sum(
            file.size
            for name, file in wanted.items()
            if not (self.folder / name).exists() and not self.hub.holds(file)
        )
        folder = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            setting = self.hub.failures.cache_setting
            raise ModelError(
                Reason.DISK_FULL,
                f"{needed} bytes are to be fetched, but {free} are free where they would go: free "
                f"some, or set {setting} or model_download_path to another disk",
            )


def ask(failures: Failures, action: Callable[[], T], label: str, held: T | None) -> T:
    """Asks a hub for what is current, or takes what is held of it if it cannot be reached.

    Args:
        failures: How the hub's errors are sorted.
        action: What to ask.
        label: Names the checkpoint in messages.
        held: What this machine knows without the hub, which then is asked once only.

    Raises:
        ModelError: As the hub answers; SOURCE_UNAVAILABLE only if nothing is held.
    """
    try:
        return persist(failures, action, label, PAUSES if held is None else ())
    except ModelError as error:
        if held is None or error.reason is not Reason.SOURCE_UNAVAILABLE:
            raise
        return held


def _release(lock: FileLock, downloads: Sequence[Future[RemoteFile]]) -> None:
    wait([download for download in downloads if not download.cancelled()])
    lock.release()
