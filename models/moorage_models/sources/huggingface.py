"""HUGGINGFACE: a repository on the Hugging Face Hub, through `huggingface_hub`."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import _xet, build_hf_headers  # type: ignore[attr-defined]

from moorage_models.errors import ModelError, Reason
from moorage_models.sources.failures import Failures
from moorage_models.sources.hf_cache import COMMIT, HubCache
from moorage_models.sources.hf_errors import FAILURES
from moorage_models.sources.internal import download_folder
from moorage_models.sources.progress import FileProgress
from moorage_models.sources.record import Held, RemoteFile
from moorage_models.sources.remote import RemoteRepository, ask
from moorage_models.sources.source import ModelRequest, ModelSource, Policy, within

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"(?!/)(?!.*\.\.)[\w./+@-]+")

# The client warns on stderr of every attempt that fails; what comes of it is raised from here.
_log = logging.getLogger("huggingface_hub")
if _log.level == logging.WARNING:
    _log.setLevel(logging.ERROR)


@dataclass(frozen=True)
class HuggingFace:
    """One repository at one commit.

    Attributes:
        repo_id: `owner/name`.
        commit: The commit.
        cache: Where the client keeps files.
    """

    repo_id: str
    commit: str
    cache: HubCache

    @property
    def failures(self) -> Failures:
        """How the client's errors are sorted."""
        return FAILURES

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a file, by one ranged request."""
        url = huggingface_hub.hf_hub_url(self.repo_id, name, revision=self.commit)
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
        return bytes(content[: stop - start])

    def stated(self, name: str) -> str:
        """Nothing more: the list has all digests."""
        return ""

    def bring(self, name: str, target: Path, progress: FileProgress) -> str:
        """Downloads a file, if it is not there, to where the client keeps it."""
        huggingface_hub.hf_hub_download(
            self.repo_id,
            name,
            revision=self.commit,
            local_dir=self.cache.local_dir,
            tqdm_class=progress.bar(),
        )
        return ""

    def holds(self, file: RemoteFile) -> bool:
        """Whether the cache has the file's blob from another commit."""
        digest = file.digest.partition(":")[2]
        return bool(digest) and (self.cache.home / "blobs" / digest).exists()

    def abort(self) -> None:
        """Ends what hf_xet is moving, in threads of its own, which no exception of ours reaches.

        It ends the transfers of other loads as well: these then try again.
        """
        if abort := getattr(_xet, "abort_xet_session", None):
            abort()

    def sweep(self) -> None:
        """Removes half-fetched files of processes that are gone."""
        self.cache.sweep()


def open_hub(request: ModelRequest, policy: Policy) -> RemoteRepository:
    """The repository that a request names: its path if it has one, else its id.

    A commit that was fetched before is opened without a network request. If the hub cannot be
    reached, what this machine holds for the revision is used, if it is whole.

    Raises:
        ModelError: MODEL_PATH_REQUIRED if neither names a repository; SOURCE_NOT_ALLOWED for a
            download path outside the roots, or an owner that is not on the list;
            SOURCE_UNAVAILABLE, SOURCE_AUTH_REQUIRED or CHECKPOINT_NOT_FOUND as the hub answers.
    """
    repo_id, asked = request.model_path or request.model_id, request.revision or "main"
    if not _REPO_ID.fullmatch(repo_id):
        raise ModelError(
            Reason.MODEL_PATH_REQUIRED,
            f"{repo_id!r} is not a Hugging Face repository: give owner/name as model_path",
        )
    policy.require(ModelSource.HUGGINGFACE, repo_id)
    if not _REVISION.fullmatch(asked):
        raise ModelError(Reason.CHECKPOINT_NOT_FOUND, f"{asked!r} cannot be a revision")
    local_dir = download_folder(request.download_path, policy)
    roots = policy.real_roots if local_dir else None
    cache = HubCache.of(repo_id, local_dir)

    def at(commit: str, held: Held) -> RemoteRepository:
        hub = HuggingFace(repo_id, commit, cache)
        folder = cache.folder(commit)
        return RemoteRepository(
            hub, repo_id, asked, commit, folder, cache.records, held, policy.verify, roots
        )

    def current() -> RemoteRepository:
        info = _info(repo_id, asked)
        commit = str(info.sha)
        if not COMMIT.fullmatch(commit):  # it becomes the name of a folder
            raise OSError("the hub names no commit")
        return at(commit, cache.held(commit) or Held(_listing(info), {}))

    commit = cache.commit(asked)
    held = cache.held(commit)
    if held and asked == commit:
        return at(commit, held)
    held = held or cache.found(commit)
    return ask(FAILURES, current, f"{repo_id}@{asked}", at(commit, held) if held else None)


def _info(repo_id: str, revision: str) -> huggingface_hub.ModelInfo:
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    api = huggingface_hub.HfApi()
    return api.model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)


def _listing(info: huggingface_hub.ModelInfo) -> dict[str, RemoteFile]:
    """The files of a commit; a name that leads out of a folder is not listed."""
    return {
        file.rfilename: RemoteFile(file.size or 0, _digest(file))
        for file in info.siblings or ()
        if within(file.rfilename)
    }


def _digest(file: RepoSibling) -> str:
    """The SHA-256 of a large file, which git has by a pointer only; of others git's own digest."""
    if file.lfs:
        return f"sha256:{file.lfs.sha256}"
    return f"git:{file.blob_id}" if file.blob_id else ""
