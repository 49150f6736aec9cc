"""GCS: a folder of objects in a Google Cloud Storage bucket."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from moorage_models.errors import ModelError, Reason
from moorage_models.sources.failures import Failures, persist
from moorage_models.sources.gcs_prefix import FAILURES, Object, Prefix
from moorage_models.sources.progress import FileProgress
from moorage_models.sources.record import Held, Records, RemoteFile
from moorage_models.sources.remote import RemoteRepository, ask
from moorage_models.sources.source import (
    ModelRequest,
    ModelSource,
    Policy,
    cache_folder,
    within,
)

_PATH = re.compile(r"gs://([a-z0-9][a-z0-9._-]+[a-z0-9])/(.+?)/?")
_REVISION = re.compile(r"[0-9a-f]{16}")
_PIECE_BYTES = 32 << 20
_PARALLEL_PIECES = 4  # of each file that is fetched; so many are in memory
_PIECE_PAUSES = (0.5,)  # seconds before the further attempt that each of thousands may need


@dataclass(frozen=True)
class CloudStorage:
    """A prefix at one revision.

    Attributes:
        prefix: The prefix.
        revision: The digest of its objects.
        records: What was fetched and verified; the revisions' files are beside it.
        objects: The objects, once they were listed.
    """

    prefix: Prefix
    revision: str
    records: Records
    objects: dict[str, Object] = field(default_factory=dict, repr=False)

    @property
    def failures(self) -> Failures:
        """How the client's errors are sorted."""
        return FAILURES

    @property
    def folder(self) -> Path:
        """Where the files are put."""
        return self.records.home / self.revision

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a file, by one ranged request."""
        return self.prefix.download(
            name, self._generation(name), range(start, stop), lambda _: None
        )

    def stated(self, name: str) -> str:
        """Nothing more: the list has all digests."""
        return ""

    def bring(self, name: str, target: Path, progress: FileProgress) -> str:
        """Downloads a file, if it is not there, from where an earlier attempt ended."""
        if target.exists():
            return ""
        partial = target.with_name(target.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as file:
            progress.advance(file.tell())
            self._append(file, name, progress)
        os.replace(partial, target)
        return ""

    def holds(self, file: RemoteFile) -> bool:
        """No: each revision has files of its own."""
        return False

    def abort(self) -> None:
        """Does nothing: what arrives next ends a download."""

    def sweep(self) -> None:
        """Removes the half-fetched files of other revisions; those of this one are gone on with."""
        for partial in self.records.home.rglob("*.partial"):
            if not partial.is_relative_to(self.folder):
                partial.unlink(missing_ok=True)

    def _append(self, file: BinaryIO, name: str, progress: FileProgress) -> None:
        """Writes the rest of an object to a file, in order; several requests are under way."""
        generation, start = self._generation(name), file.tell()
        pool = ThreadPoolExecutor(_PARALLEL_PIECES, "fetch-piece")
        lock, over = threading.Lock(), threading.Event()

        def advance(count: int) -> None:
            with lock:
                if over.is_set():
                    raise ModelError(Reason.LOAD_CANCELLED, f"another piece of {name} has failed")
                progress.advance(count)

        def download(span: range) -> bytes:
            advance(0)  # ends here if the rest has ended
            return self.prefix.download(name, generation, span, advance)

        def piece(at: int) -> bytes:
            span = range(at, min(at + _PIECE_BYTES, progress.size))
            return persist(FAILURES, lambda: download(span), name, _PIECE_PAUSES)

        coming: deque[Future[bytes]] = deque()
        try:
            for at in range(start, progress.size, _PIECE_BYTES):
                coming.append(pool.submit(piece, at))
                if len(coming) == _PARALLEL_PIECES:
                    file.write(progress.wait(coming.popleft()))
            while coming:
                file.write(progress.wait(coming.popleft()))
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _generation(self, name: str) -> int:
        """The generation of a file; lists the objects if the revision was opened without.

        Raises:
            ModelError: CHECKPOINT_NOT_FOUND if the objects are another revision's by now;
                CHECKPOINT_UNSUPPORTED if the object is stored compressed.
        """
        if not self.objects:
            self.objects.update(_require(self.prefix, self.prefix.objects(), self.revision))
        found = self.objects[name]
        if found.encoding not in {"", "identity"}:
            raise ModelError(
                Reason.CHECKPOINT_UNSUPPORTED,
                f"gs://{self.prefix.key}/{name} is stored with Content-Encoding {found.encoding}: "
                "upload it again without (gcloud storage cp without --gzip-local)",
            )
        return found.generation


def open_bucket(request: ModelRequest, policy: Policy) -> RemoteRepository:
    """The folder of objects that a request names as `gs://bucket/prefix`.

    A revision that was fetched before is opened without a network request. If the bucket cannot be
    reached, what this machine holds of the revision that was last used is used.

    Raises:
        ModelError: MODEL_PATH_REQUIRED without such a path; SOURCE_NOT_ALLOWED if it is not on
            the list; CHECKPOINT_NOT_FOUND if no objects are there, or not at the revision;
            SOURCE_UNAVAILABLE or SOURCE_AUTH_REQUIRED as the bucket answers.
    """
    prefix = _prefix(request)
    policy.require(ModelSource.GCS, prefix.key)
    asked = request.revision or prefix.key
    if request.revision and not _REVISION.fullmatch(request.revision):
        raise ModelError(
            Reason.CHECKPOINT_NOT_FOUND,
            f"{request.revision!r} cannot be a revision of gs://{prefix.key}: leave it out, or "
            "give the 16 digits that an earlier load told",
        )
    records = Records(cache_folder() / "gcs" / prefix.bucket / prefix.name.replace("/", "--"))

    def at(revision: str, held: Held, objects: dict[str, Object]) -> RemoteRepository:
        hub = CloudStorage(prefix, revision, records, objects)
        return RemoteRepository(
            hub, prefix.key, asked, revision, hub.folder, records, held, policy.verify
        )

    def current() -> RemoteRepository:
        objects = prefix.objects()
        _require(prefix, objects, request.revision)
        revision = prefix.revision(objects)
        held = records.recorded(revision, records.home / revision)
        return at(revision, held or Held({n: o.file for n, o in objects.items()}, {}), objects)

    last = request.revision or records.revision(prefix.key)
    held = records.recorded(last, records.home / last) if _REVISION.fullmatch(last) else None
    if held and request.revision:
        return at(last, held, {})
    return ask(FAILURES, current, f"gs://{prefix.key}", at(last, held, {}) if held else None)


def _prefix(request: ModelRequest) -> Prefix:
    path = _PATH.fullmatch(request.model_path)
    if path is None or not within(path[2]):
        raise ModelError(
            Reason.MODEL_PATH_REQUIRED,
            f"source {request.source.name} needs the folder of {request.model_id!r} in a bucket "
            f"as model_path: gs://bucket/prefix, not {request.model_path!r}",
        )
    return Prefix(path[1], path[2])


def _require(prefix: Prefix, objects: Mapping[str, Object], revision: str) -> Mapping[str, Object]:
    """The objects, if they are those of a revision, or none is asked for."""
    if revision and (found := prefix.revision(objects)) != revision:
        raise ModelError(
            Reason.CHECKPOINT_NOT_FOUND,
            f"the objects of gs://{prefix.key} have changed since revision {revision}: ask for "
            f"{found}, or leave the revision out",
        )
    return objects
