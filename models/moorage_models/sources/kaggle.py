"""KAGGLE: one variation of a model at Kaggle, through the client that `kagglehub` uses."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from kagglehub.config import get_cache_folder
from kagglehub.handle import ModelHandle

from moorage_models.errors import ModelError, Reason
from moorage_models.sources import kaggle_api
from moorage_models.sources.failures import Failures
from moorage_models.sources.internal import download_folder
from moorage_models.sources.kaggle_api import FAILURES
from moorage_models.sources.progress import FileProgress
from moorage_models.sources.record import Held, Records, RemoteFile
from moorage_models.sources.remote import RemoteRepository, ask
from moorage_models.sources.source import ModelRequest, ModelSource, Policy

_SLUG, _NUMBER = r"(\w[\w.-]*)", r"([1-9][0-9]{0,8})"
_MODEL_PATH = re.compile(rf"{_SLUG}/{_SLUG}/{_SLUG}/{_SLUG}(?:/{_NUMBER})?", re.ASCII)
_VERSION = re.compile(_NUMBER)
_LATEST = "latest"
_PIECE_BYTES = 256 << 10
_PARTIAL = ".moorage.partial"


@dataclass(frozen=True)
class Kaggle:
    """One version of a variation.

    Attributes:
        handle: Its owner, model, framework, variation and version.
        home: The folder of the variation in kagglehub's cache.
        digests: Those of the files of which ranges were read: the list has none.
    """

    handle: ModelHandle
    home: Path
    digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def failures(self) -> Failures:
        """How the client's errors are sorted."""
        return FAILURES

    @property
    def version(self) -> str:
        """The version."""
        return str(self.handle.version)

    @property
    def folder(self) -> Path:
        """The folder of the version's files."""
        return self.home / self.version

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a file, by one ranged request to the storage."""
        content = bytearray()
        with self._opened(name, f"bytes={start}-{stop - 1}") as response:
            self.digests[name] = _digest(response)
            if response.status_code == 206 or start == 0:
                for piece in response.iter_content(min(stop - start, _PIECE_BYTES)):
                    content += piece
                    if len(content) >= stop - start:
                        break
        return bytes(content[: stop - start])

    def stated(self, name: str) -> str:
        """The digest of a file of which a range was read."""
        return self.digests.get(name, "")

    def bring(self, name: str, target: Path, progress: FileProgress) -> str:
        """Downloads a file, unless it is there, and returns the digest that the storage states.

        A thread of its own asks Kaggle: once the load is over, one that stalls is left behind, and
        does not keep the file.
        """
        with _apart(progress) as (apart, opened):
            if target.exists() and target.stat().st_size == progress.size:
                return str(apart(self._stated, name, progress.size))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial_file = target.with_name(target.name + _PARTIAL)
            partial_file.touch()
            done = partial_file.stat().st_size
            done = done if done < progress.size else 0
            asked = f"bytes={done}-" if done else ""
            with open(partial_file, "r+b") as file:
                response = apart(opened.enter_context, self._opened(name, asked))
                start = done if response.status_code == 206 else 0
                file.truncate(start)
                file.seek(start)
                progress.advance(start)
                pieces = response.iter_content(_PIECE_BYTES)
                while file.tell() <= progress.size and (piece := apart(next, pieces, b"")):
                    progress.advance(len(piece))
                    file.write(piece)
                if file.tell() != progress.size:
                    count = file.tell()
                    file.truncate(0)
                    raise OSError(f"{name} was sent with {count} of {progress.size} bytes")
        os.replace(partial_file, target)
        return _digest(response)

    def holds(self, file: RemoteFile) -> bool:
        """No: kagglehub's cache keeps the files of each version apart."""
        return False

    def abort(self) -> None:
        """Does nothing: `bring` does not wait for what stalls."""

    def sweep(self) -> None:
        """Removes half-fetched files that this version cannot go on with."""
        for path in self.home.rglob(f"*{_PARTIAL}"):
            whole = path.with_name(path.name.removesuffix(_PARTIAL))
            if whole.exists() or not path.is_relative_to(self.folder):
                path.unlink(missing_ok=True)

    def held(self) -> Held | None:
        """What was fetched of the version and verified, or all of it if kagglehub has it."""
        return Records(self.home).recorded(self.version, self.folder) or self._found()

    def _found(self) -> Held | None:
        """What kagglehub downloaded of the version, which it marks once it has all."""
        if not self._is_complete():
            return None
        paths = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*")}
        paths = {n: p for n, p in paths.items() if p.is_file() and not n.endswith(_PARTIAL)}
        return Held({n: RemoteFile(p.stat().st_size) for n, p in paths.items()}, paths)

    def _is_complete(self) -> bool:
        return (self.home / f"{self.version}.complete").exists() and self.folder.is_dir()

    def _stated(self, name: str, size: int) -> str:
        """The digest of a file that is here already; none of what kagglehub has checked."""
        if self._is_complete():
            return ""
        with self._opened(name, "bytes=0-0" if size else "") as response:
            return _digest(response)

    @contextmanager
    def _opened(self, name: str, asked: str) -> Iterator[requests.Response]:
        """The storage's answer with a file, or with a range of it, still to be read."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": asked} if asked else {})
        address, timeout = kaggle_api.address(self.handle, name), kaggle_api.TIMEOUT
        with requests.get(address, headers=headers, stream=True, timeout=timeout) as response:
            response.raise_for_status()
            yield response


def open_kaggle(request: ModelRequest, policy: Policy) -> RemoteRepository:
    """The variation that a request's path names, at the version it names or at the latest.

    A version that was fetched before, by this package or by kagglehub, is opened without a network
    request. If the latest version cannot be asked for, the one that was used last is used, or else
    the newest that kagglehub has.

    Raises:
        ModelError: MODEL_PATH_REQUIRED for a path of another form; INVALID_REQUEST for two
            versions; SOURCE_NOT_ALLOWED for a download path outside the roots, or a model that is
            not on the list; SOURCE_UNAVAILABLE, SOURCE_AUTH_REQUIRED or CHECKPOINT_NOT_FOUND as
            Kaggle answers.
    """
    handle = _handle(request)
    key = str(handle.with_version(0))
    policy.require(ModelSource.KAGGLE, key)
    below = f"models/{key}"
    local = download_folder(request.download_path and f"{request.download_path}/{below}", policy)
    home = local or Path(get_cache_folder()) / below
    asked = str(handle.version or _LATEST)
    label = f"{key}@{asked}"

    def at(version: int) -> tuple[Kaggle, Held | None]:
        hub = Kaggle(handle.with_version(version), home)
        return hub, hub.held()

    versions = [handle.version] if handle.version else _known(home)
    hub, held = next((found for found in map(at, versions) if found[1]), at(handle.version or 0))
    if not handle.version:
        known: tuple[Kaggle, Held | None] | None = (hub, held) if held else None
        hub, held = ask(FAILURES, lambda: at(kaggle_api.latest(handle)), label, known)
    if held is None:
        held = Held(ask(FAILURES, lambda: kaggle_api.listing(hub.handle), label, None), {})
    return RemoteRepository(
        hub,
        key,
        asked,
        hub.version,
        hub.folder,
        Records(home),
        held,
        policy.verify,
        policy.real_roots if local else None,
    )


def _handle(request: ModelRequest) -> ModelHandle:
    match = _MODEL_PATH.fullmatch(request.model_path)
    if match is None or not _is_framework(match[3]):
        raise ModelError(
            Reason.MODEL_PATH_REQUIRED,
            f"{request.model_path!r} is not a model at Kaggle: give "
            "owner/model/framework/variation, or owner/model/framework/variation/version, as "
            "model_path, for example google/gemma/flax/2b-it/2",
        )
    stated = {version for version in (match[5], request.revision) if version}
    if len(stated) > 1 or not all(map(_VERSION.fullmatch, stated)):
        raise ModelError(
            Reason.INVALID_REQUEST,
            f"revision {request.revision!r} does not go with {request.model_path!r}: a version is "
            "a number, at the end of model_path or as revision",
        )
    owner, model, framework, variation, _ = match.groups()
    return ModelHandle(owner, model, framework, variation, int(stated.pop()) if stated else None)


def _is_framework(name: str) -> bool:
    try:
        ModelHandle("", "", name, "", None).framework_enum()
    except ValueError:
        return False
    return True


def _known(home: Path) -> list[int]:
    """The versions that a request without one may mean: the last that was used, then the newest."""
    last = Records(home).revision(_LATEST)
    complete = {path.stem for path in home.glob("*.complete")}
    newest = sorted((int(name) for name in complete if _VERSION.fullmatch(name)), reverse=True)
    return [int(last), *newest] if _VERSION.fullmatch(last) else newest


@contextmanager
def _apart(progress: FileProgress) -> Iterator[tuple[Callable[..., Any], ExitStack]]:
    """Has things done in another thread, which is left behind if it stalls as the load ends.

    Yields:
        What waits for an action in that thread, and the stack of what that thread closes.
    """
    pool, opened = ThreadPoolExecutor(1, "fetch-read"), ExitStack()
    try:
        yield lambda action, *args: progress.wait(pool.submit(action, *args)), opened
    finally:
        pool.submit(opened.close)
        pool.shutdown(wait=False)


def _digest(response: requests.Response) -> str:
    """The digest of the whole file, from a header like `crc32c=n03x6A==,md5=Ojk9c3dh...`."""
    stated = dict(re.findall(r"(\w+)=([\w+/]+=*)", response.headers.get("x-goog-hash", "")))
    for algorithm in ("md5", "crc32c"):
        if value := stated.get(algorithm):
            return f"{algorithm}:{base64.b64decode(value).hex()}"
    return ""
