"""A Hugging Face Hub on loopback: the requests that its client makes, and the ways they fail.

Large files are answered by a redirect to a second server under another host name, as the real
Hub does: its client takes a redirect to the same origin for the file itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from loopback import Handler, Headers, Loopback

LARGE = (".safetensors", ".bin", ".pth", ".gguf")

#: Tokens that the hub knows, and whether they may read gated and private repositories.
TOKENS = {"hf_granted": True, "hf_other": False}


@dataclass(frozen=True)
class Request:
    """One request and its answer.

    Attributes:
        line: `METHOD /path`; files behind a redirect are under `/cdn/`.
        status: The status that was answered.
        range: The `Range` header.
        token: The token that came with it.
        sent: Bytes of body that were sent.
    """

    line: str
    status: int
    range: str
    token: str
    sent: int


@dataclass
class Repo:
    """A repository: files by commit, and commits by branch or tag."""

    id: str
    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> str:
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


class RefusalError(Exception):
    """An answer that is an error, with the code by which the client tells which."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Hub(Loopback[Request]):
    """The hub, which serves while it is entered.

    Attributes:
        repos: The repositories by id.
        xet: Hashes in the Xet storage at `cas`, by sha256: such files are not redirected to.
        cas: URL of the Xet storage.
    """

    def __init__(self) -> None:
        super().__init__(_Handler, ("127.0.0.1", "localhost"))
        self.url, self.cdn = self.urls
        self.repos: dict[str, Repo] = {}
        self.xet: dict[str, str] = {}
        self.cas = ""

    def push(self, repo_id: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Makes a commit of exactly these files, moves the branch there and returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id))
        digest = hashlib.sha1(repo_id.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + hashlib.sha1(content).digest())
        commit = digest.hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[branch] = commit
        return commit


class _Handler(Handler):
    hub: Hub

    def do_GET(self) -> None:  # noqa: N802 the name is the base class's
        self.path = unquote(self.path)
        self.line = f"{self.command} {urlsplit(self.path).path}"
        self.fault = self.hub.next_fault(self.line)
        try:
            if self.fault.status:
                raise RefusalError(self.fault.status, "", "out of order")
            for pattern, answer in _ROUTES:
                if match := re.fullmatch(pattern, urlsplit(self.path).path):
                    answer(self, *match.groups())
                    return
            raise RefusalError(404, "", "no such page")
        except RefusalError as refusal:
            self._answer(refusal.status, refusal.headers, json.dumps({"error": str(refusal)}))

    do_HEAD = do_GET  # noqa: N815 the name is the base class's

    def _repo(self, repo_id: str) -> Repo:
        """The repository, if the request's token may see that it exists."""
        if self._token() and self._token() not in TOKENS:
            raise RefusalError(401, "", "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not TOKENS.get(self._token())):
            raise RefusalError(401, "RepoNotFound", "Repository not found")
        return repo

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _info(self, repo_id: str, revision: str | None) -> None:
        repo = self._repo(repo_id)
        commit = repo.commit(revision or "main")
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        names = sorted(repo.commits[commit])
        siblings = [
            {"rfilename": n} | (_blob(repo.commits[commit][n], n) if blobs else {}) for n in names
        ]
        info = {"id": repo.id, "sha": commit, "siblings": siblings, "private": repo.private}
        self._answer(200, {}, json.dumps(info | {"gated": repo.gated, "tags": []}))

    def _tree(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        files = repo.commits[repo.commit(revision)]
        entries = []
        for name, content in sorted(files.items()):
            blob = _blob(content, name)
            entry = {"type": "file", "path": name, "size": len(content), "oid": blob["blobId"]}
            lfs = blob.get("lfs")
            entries.append(entry | ({"lfs": lfs | {"oid": lfs["sha256"]}} if lfs else {}))
        self._answer(200, {}, json.dumps(entries))

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        if repo.gated and not TOKENS.get(self._token()):
            status = 403 if self._token() else 401
            raise RefusalError(status, "GatedRepo", f"Access to model {repo_id} is restricted")
        commit = repo.commit(revision)
        headers = {"X-Repo-Commit": commit}
        content = repo.commits[commit].get(name)
        if content is None:
            refusal = RefusalError(404, "EntryNotFound", "Entry not found")
            refusal.headers |= headers
            raise refusal
        if not name.endswith(LARGE):
            self._send(content, headers | {"ETag": f'"{_git_digest(content)}"'})
            return
        digest = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        if digest in self.hub.xet:
            route = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": self.hub.xet[digest], "X-Xet-Refresh-Route": route}
        location = f"{self.hub.cdn}/cdn/{repo_id}/{commit}/{quote(name)}?Signature=secret"
        self._answer(302, headers | {"Location": location})

    def _cdn(self, repo_id: str, commit: str, name: str) -> None:
        self._send(self.hub.repos[repo_id].commits[commit][name], {})

    def _xet_token(self, repo_id: str) -> None:
        self._repo(repo_id)
        token = {"X-Xet-Access-Token": "token", "X-Xet-Token-Expiration": "99999999999"}
        self._answer(200, token | {"X-Xet-Cas-Url": self.hub.cas})

    def _send(self, content: bytes, headers: Headers) -> None:
        """Answers with a file, or the range of it that was asked for."""
        content = self.fault.damaged(content)
        headers |= {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(200, headers, content)
            return
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise RefusalError(416, "", "the range is outside the file")
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        self._answer(206, headers, content[start:stop])

    def _answer(self, status: int, headers: Headers, body: bytes | str = b"") -> None:
        content = body.encode() if isinstance(body, str) else body
        length = len(content)
        stalls, limit = self.fault.stall is not None, self.fault.cut
        limit = self.fault.stall if stalls else limit
        content = b"" if self.command == "HEAD" else content[:limit]
        ranged = self.headers.get("Range", "")
        self.hub.log.append(Request(self.line, status, ranged, self._token(), len(content)))
        self.close_connection |= limit is not None
        if stalls and not content:
            self.hub.closed.wait()
            return
        self.send_response(status)
        for key, value in ({"Content-Length": str(length)} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.send_body(content)
        if stalls:
            self.hub.closed.wait()


_NAME = "([^/]+/[^/]+)"

_ROUTES = (
    (f"/api/models/{_NAME}", lambda self, repo: self._info(repo, None)),
    (f"/api/models/{_NAME}/revision/(.+)", _Handler._info),
    (f"/api/models/{_NAME}/tree/([^/]+)", _Handler._tree),
    (f"/api/models/{_NAME}/xet-read-token/.+", _Handler._xet_token),
    (f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
    (f"/cdn/{_NAME}/([^/]+)/(.+)", _Handler._cdn),
)


def _blob(content: bytes, name: str) -> dict[str, Any]:
    """What `?blobs=true` states of a file."""
    blob: dict[str, Any] = {"size": len(content), "blobId": _git_digest(content)}
    if name.endswith(LARGE):
        digest = hashlib.sha256(content).hexdigest()
        blob["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
    return blob


def _git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
