"""HUGGINGFACE: a repository on the Hugging Face Hub, through `huggingface_hub`."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import _xet, build_hf_headers  # type: ignore[attr-defined]

from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_models.sources.hf_cache import Held, HubCache, HubFile, verify
from moorage_models.sources.hf_errors import persist
from moorage_models.sources.hf_progress import FileProgress
from moorage_models.sources.internal import within_roots
from moorage_models.sources.source import ModelRequest, Policy, companions

_PARALLEL_FILES = 4
_PAUSES = (1.0, 2.0, 4.0)  # seconds before each further attempt
_POLL_SECONDS = 0.1
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"(?!/)(?!.*\.\.)[\w./+@-]+")

# The client warns on stderr of every attempt that fails; what comes of it is raised from here.
_log = logging.getLogger("huggingface_hub")
if _log.level == logging.WARNING:
    _log.setLevel(logging.ERROR)


@dataclass(frozen=True)
class HubRepository:
    """A repository at one commit.

    Attributes:
        repo_id: `owner/name`.
        asked: The revision that was asked for.
        revision: The commit that it stood for.
        cache: Where files are kept.
        held: The files of the commit, and what of them this machine holds.
        heads: The beginnings of files that were read from the hub.
    """

    repo_id: str
    asked: str
    revision: str
    cache: HubCache
    held: Held
    heads: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def label(self) -> str:
        """The repository and the commit."""
        return f"{self.repo_id}@{self.revision[:12]}"

    @property
    def key(self) -> str:
        """The repository."""
        return self.repo_id

    @property
    def local(self) -> Path | None:
        """The folder of a commit that was fetched before."""
        return self.cache.folder(self.revision) if self.held.paths else None

    @property
    def files(self) -> Mapping[str, int]:
        """Sizes by name."""
        return {name: file.size for name, file in self.held.files.items()}

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a file: from this machine, or by a ranged request."""
        if name in self.held.paths:
            with open(self.held.paths[name], "rb") as file:
                file.seek(start)
                return file.read(stop - start)
        head = self.heads.get(name, b"")
        if stop <= len(head):
            return head[start:stop]
        content = persist(lambda: self._request(name, start, stop), self.label, _PAUSES)
        if start == len(head):
            self.heads[name] = head + content
        return content

    def fetch(self, names: Sequence[str], monitor: LoadMonitor) -> Path:
        """Downloads files and their companions, several at a time, and verifies them once.

        Returns:
            The snapshot's folder.

        Raises:
            ModelError: SOURCE_UNAVAILABLE or SOURCE_AUTH_REQUIRED as the hub answers; DISK_FULL;
                CHECKPOINT_CORRUPT if a file is not what the hub states; LOAD_CANCELLED.
        """
        wanted = {name: self.held.files[name] for name in [*companions(self.held.files), *names]}
        monitor.expect("fetch", sum(file.size for file in wanted.values()))
        self.cache.require_space(self.revision, wanted)
        over = threading.Event()
        pool = ThreadPoolExecutor(_PARALLEL_FILES, "fetch")
        try:
            futures = {
                pool.submit(self._bring, name, FileProgress(monitor, over, file.size)): name
                for name, file in wanted.items()
            }
            pending = set(futures)
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
                monitor.check()
                wanted |= {futures[future]: future.result() for future in done}
        except BaseException:
            over.set()
            _abort_transfers()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self.cache.record(self.asked, self.revision, {**self.held.files, **wanted}, self.heads)
        return self.cache.folder(self.revision)

    def _bring(self, name: str, progress: FileProgress) -> HubFile:
        """Downloads one file, if it is not there, and verifies it, if it was not."""
        file = self.held.files[name]
        bar = progress.bar()

        def download() -> None:
            progress.restart()
            huggingface_hub.hf_hub_download(
                self.repo_id,
                name,
                revision=self.revision,
                local_dir=self.cache.local_dir,
                tqdm_class=bar,
            )

        persist(download, self.label, _PAUSES)
        path = self.cache.folder(self.revision) / name
        verified = verify(path, name, file, progress.advance)
        progress.finish()
        return verified

    def _request(self, name: str, start: int, stop: int) -> bytes:
        url = huggingface_hub.hf_hub_url(self.repo_id, name, revision=self.revision)
        asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        content = bytearray()
        session = huggingface_hub.get_session()
        headers = build_hf_headers(headers=asked)
        with session.stream("GET", url, headers=headers, timeout=timeout) as response:
            huggingface_hub.hf_raise_for_status(response)
            if response.status_code == 206 or start == 0:
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) >= stop - start:
                        break
        if len(content) < stop - start:
            raise OSError(f"{name} was answered with {len(content)} of {stop - start} bytes")
        return bytes(content[: stop - start])


def open_hub(request: ModelRequest, policy: Policy) -> HubRepository:
    """The repository that a request names: its path if it has one, else its id.

    A commit that was fetched before is opened without a network request. If the hub cannot be
    reached, what this machine holds for the revision is used, if it is whole.

    Raises:
        ModelError: MODEL_PATH_REQUIRED if neither names a repository; SOURCE_NOT_ALLOWED for a
            download path outside the roots; SOURCE_UNAVAILABLE, SOURCE_AUTH_REQUIRED or
            CHECKPOINT_NOT_FOUND as the hub answers.
    """
    repo_id, asked = request.model_path or request.model_id, request.revision or "main"
    if not _REPO_ID.fullmatch(repo_id):
        raise ModelError(
            Reason.MODEL_PATH_REQUIRED,
            f"{repo_id!r} is not a Hugging Face repository: give owner/name as model_path",
        )
    if not _REVISION.fullmatch(asked):
        raise ModelError(Reason.CHECKPOINT_NOT_FOUND, f"{asked!r} cannot be a revision")
    local_dir = within_roots(request.download_path, policy) if request.download_path else None
    cache = HubCache.of(repo_id, local_dir)
    commit = cache.commit(asked)
    held = cache.recorded(commit)
    if held and asked == commit:
        return HubRepository(repo_id, asked, commit, cache, held)
    held = held or cache.found(commit)
    pauses = () if held else _PAUSES
    try:
        info = persist(lambda: _info(repo_id, asked), f"{repo_id}@{asked}", pauses)
    except ModelError as error:
        if held is None or error.reason is not Reason.SOURCE_UNAVAILABLE:
            raise
        return HubRepository(repo_id, asked, commit, cache, held)
    commit = str(info.sha)
    held = cache.recorded(commit) or Held(_listing(info), {})
    return HubRepository(repo_id, asked, commit, cache, held)


def _info(repo_id: str, revision: str) -> huggingface_hub.ModelInfo:
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    api = huggingface_hub.HfApi()
    return api.model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)


def _listing(info: huggingface_hub.ModelInfo) -> dict[str, HubFile]:
    """The files of a commit; a name that leads out of a folder is not listed."""
    return {
        file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else "")
        for file in info.siblings or ()
        if not {"", ".."} & set(file.rfilename.split("/"))
    }


def _abort_transfers() -> None:
    """Ends what hf_xet is moving, in threads of its own, which no exception of ours reaches.

    It ends the transfers of other loads as well: these then try again.
    """
    if abort := getattr(_xet, "abort_xet_session", None):
        abort()
