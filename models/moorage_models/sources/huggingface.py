"""HUGGINGFACE: a repository on the Hugging Face Hub, through `huggingface_hub`."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from tqdm import tqdm

from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_models.sources.source import ModelRequest, Policy

_PARALLEL_FILES = 4
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")

_TOKEN_HINT = "accept the terms on the model's page and set HF_TOKEN on the server"

#: The hub's errors, the most special first: several derive from one another.
_ERRORS: tuple[tuple[type[Exception], Reason, str], ...] = (
    (hub_errors.GatedRepoError, Reason.SOURCE_AUTH_REQUIRED, _TOKEN_HINT),
    (
        hub_errors.RepositoryNotFoundError,
        Reason.CHECKPOINT_NOT_FOUND,
        "check the id; a private repository needs HF_TOKEN set on the server",
    ),
    (hub_errors.RevisionNotFoundError, Reason.CHECKPOINT_NOT_FOUND, "check the revision"),
    (hub_errors.EntryNotFoundError, Reason.CHECKPOINT_NOT_FOUND, "the file is not there"),
    (hub_errors.HFValidationError, Reason.CHECKPOINT_NOT_FOUND, "check the id"),
)


@dataclass(frozen=True)
class HubRepository:
    """A repository at one commit.

    Attributes:
        repo_id: `owner/name`.
        revision: The commit.
        files: Sizes by name.
        local_dir: Where files go; None for the hub's cache.
        cached: The snapshot's folder, if the whole checkpoint is on this machine already.
    """

    repo_id: str
    revision: str
    files: Mapping[str, int]
    local_dir: str | None = None
    cached: Path | None = None

    @property
    def label(self) -> str:
        """The repository and the commit."""
        return f"{self.repo_id}@{self.revision[:12]}"

    @property
    def key(self) -> str:
        """The repository."""
        return self.repo_id

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a file: from the cache, or by a ranged request."""
        local = self.cached / name if self.cached else self._in_cache(name)
        if local is not None:
            with open(local, "rb") as file:
                file.seek(start)
                return file.read(stop - start)
        with _mapped(self.label):
            path = f"{self.repo_id}@{self.revision}/{name}"
            content = huggingface_hub.HfFileSystem().cat_file(path, start=start, end=stop)
            assert isinstance(content, bytes)
            return content

    def fetch(self, names: Sequence[str], monitor: LoadMonitor) -> Path:
        """Downloads files, several at a time, and returns the snapshot's folder."""
        if self.cached:
            return self.cached
        monitor.expect("fetch", sum(self.files[name] for name in names))
        bar = _bar(monitor)

        def download(name: str) -> str:
            return huggingface_hub.hf_hub_download(
                self.repo_id,
                name,
                revision=self.revision,
                local_dir=self.local_dir,
                tqdm_class=bar,
            )

        with _mapped(self.label), ThreadPoolExecutor(_PARALLEL_FILES, "fetch") as pool:
            paths = list(pool.map(download, names))
        return Path(paths[0].removesuffix(names[0]))

    def _in_cache(self, name: str) -> str | None:
        found = huggingface_hub.try_to_load_from_cache(self.repo_id, name, revision=self.revision)
        return found if isinstance(found, str) else None


def open_hub(request: ModelRequest, policy: Policy) -> HubRepository:
    """The repository that a request names: its path if it has one, else its id.

    A commit that is wholly in the cache is opened without a network request. If the hub cannot
    be reached, what the cache holds for the revision is used.

    Raises:
        ModelError: MODEL_PATH_REQUIRED if neither names a repository; SOURCE_UNAVAILABLE,
            SOURCE_AUTH_REQUIRED or CHECKPOINT_NOT_FOUND as the hub answers.
    """
    repo_id = request.model_path or request.model_id
    if not _REPO_ID.fullmatch(repo_id):
        raise ModelError(
            Reason.MODEL_PATH_REQUIRED,
            f"{repo_id!r} is not a Hugging Face repository: give owner/name as model_path",
        )
    revision = request.revision or "main"
    if _COMMIT.fullmatch(revision) and (cached := _open_cached(request, repo_id, revision)):
        return cached
    try:
        with _mapped(f"{repo_id}@{revision}"):
            info = huggingface_hub.HfApi().model_info(
                repo_id, revision=revision, files_metadata=True
            )
    except ModelError as error:
        cached = _open_cached(request, repo_id, revision)
        if error.reason is not Reason.SOURCE_UNAVAILABLE or cached is None:
            raise
        return cached
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return HubRepository(repo_id, str(info.sha), sizes, request.download_path or None)


def _open_cached(request: ModelRequest, repo_id: str, revision: str) -> HubRepository | None:
    """The cached snapshot, if it holds a whole checkpoint."""
    if request.download_path:
        return None
    config = huggingface_hub.try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    commit = folder.name
    return HubRepository(repo_id, commit, sizes, cached=folder)


def _bar(monitor: LoadMonitor) -> type[tqdm[Any]]:
    """A silent progress bar for the hub's downloads, which also carries the cancellation."""

    class Bar(tqdm[Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.update(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            monitor.advance("fetch", int(n or 0))
            return None

    return Bar


@contextmanager
def _mapped(label: str) -> Iterator[None]:
    """Turns what the hub's client raises into a ModelError.

    The HTTP library below it differs between releases, so broken connections are told by being
    `OSError`s or by their module.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise _map(error, label) from error


def _map(error: Exception, label: str) -> Exception:
    for kind, reason, hint in _ERRORS:
        if isinstance(error, kind) and not isinstance(error, hub_errors.LocalEntryNotFoundError):
            return ModelError(reason, f"{label}: {hint}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return ModelError(Reason.SOURCE_AUTH_REQUIRED, f"{label}: {_TOKEN_HINT}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ModelError(Reason.DISK_FULL, f"{label}: the disk of the download cache is full")
    module = type(error).__module__.split(".")[0]
    if isinstance(error, OSError) or module in ("httpx", "httpx2", "httpcore", "requests"):
        return ModelError(
            Reason.SOURCE_UNAVAILABLE, f"{label}: the Hugging Face Hub cannot be reached"
        )
    return error
