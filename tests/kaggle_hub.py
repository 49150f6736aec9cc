"""Kaggle on loopback: the calls of its API that a load makes, its storage, and how both fail.

A file is answered by a redirect to the storage, a second server under another host name, as at
Kaggle: the credential must not go there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from loopback import Handler, Headers, Loopback

#: What the `Authorization` header may be, and whether its account has consented to licences.
ACCOUNTS = {
    "Basic " + base64.b64encode(b"alice:granted").decode(): True,
    "Basic " + base64.b64encode(b"bob:other").decode(): False,
    "Bearer KGAT_granted": True,
}

PAGE_FILES = 25


@dataclass(frozen=True)
class Request:
    """One request and its answer.

    Attributes:
        line: `POST Method`, with the path of the file for a download, or `GET /storage/...`.
        range: The `Range` header.
        account: The `Authorization` header.
        sent: Bytes of body that were sent.
    """

    line: str
    range: str
    account: str
    sent: int


@dataclass
class Variation:
    """A variation of a model: files by version."""

    gated: bool = False
    private: bool = False
    versions: dict[int, dict[str, bytes]] = field(default_factory=dict)


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Kaggle(Loopback[Request]):
    """The hub, which serves while it is entered.

    Attributes:
        variations: By `owner/model/FRAMEWORK/variation`, the framework as the API writes it.
        ranges: Whether the storage answers with ranges.
    """

    def __init__(self) -> None:
        super().__init__(_Handler, ("127.0.0.1", "localhost"))
        self.url, self.storage = self.urls
        self.variations: dict[str, Variation] = {}
        self.ranges = True

    def push(self, handle: str, files: Mapping[str, bytes]) -> Variation:
        """Adds a version of exactly these files."""
        variation = self.variations.setdefault(handle, Variation())
        variation.versions[len(variation.versions) + 1] = dict(files)
        return variation


class _Handler(Handler):
    hub: Kaggle

    def do_POST(self) -> None:  # noqa: N802 the name is the base class's
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        method = self.path.removeprefix("/v1/models.ModelApiService/")
        self._reply(f"POST {method}/{body.get('path', '')}".rstrip("/"), lambda: self._call(body))

    def do_GET(self) -> None:  # noqa: N802 the name is the base class's
        path = unquote(urlsplit(self.path).path)
        self._reply(f"GET {path}", lambda: self._file(path))

    def _reply(self, line: str, answer: Any) -> None:
        self.line = line
        self.fault = self.hub.next_fault(self.line)
        try:
            if self.fault.status:
                raise RefusalError(self.fault.status, "out of order")
            answer()
        except RefusalError as refusal:
            self._json({"code": refusal.status, "message": str(refusal)}, refusal.status)

    def _call(self, body: dict[str, Any]) -> None:
        account = self.headers.get("Authorization", "")
        if account and account not in ACCOUNTS:
            raise RefusalError(401, "Unauthenticated")
        framework = body["framework"].removeprefix("MODEL_FRAMEWORK_")
        handle = "/".join([body["ownerSlug"], body["modelSlug"], framework, body["instanceSlug"]])
        variation = self.hub.variations.get(handle)
        if variation is None:
            raise RefusalError(404, "Not found")
        if variation.private and not ACCOUNTS.get(account):
            raise RefusalError(403, "Permission 'models.get' was denied")
        method = self.line.split()[1].split("/")[0]
        if method == "GetModelInstance":
            self._json({"versionNumber": max(variation.versions), "slug": body["instanceSlug"]})
            return
        files = variation.versions.get(body["versionNumber"])
        if files is None:
            raise RefusalError(404, "No such version")
        if method == "ListModelInstanceVersionFiles":
            self._list(files, int(body.get("pageToken") or 0))
            return
        if variation.gated and not ACCOUNTS.get(account):
            raise RefusalError(403, "User must consent to the license of this model")
        place = quote(f"/storage/{handle}/{body['versionNumber']}/{body['path']}")
        location = f"{self.hub.storage}{place}?X-Goog-Signature=secret"
        self._answer(302, {"Location": location, "Content-Type": "application/json"})

    def _list(self, files: Mapping[str, bytes], start: int) -> None:
        page = sorted(files)[start : start + PAGE_FILES]
        stop = start + len(page)
        date = "2024-02-21T14:00:00.1234567Z"
        listed = [{"name": n, "size": len(files[n]), "creationDate": date} for n in page]
        self._json({"files": listed, "nextPageToken": str(stop) if stop < len(files) else ""})

    def _file(self, path: str) -> None:
        """Answers with a file, or with the range of it that was asked for."""
        match = re.fullmatch(r"/storage/([^/]+/[^/]+/[^/]+/[^/]+)/(\d+)/(.+)", path)
        if match is None:
            raise RefusalError(404, "no such page")
        content = self.hub.variations[match[1]].versions[int(match[2])][match[3]]
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        kind = "application/json" if path.endswith(".json") else "application/octet-stream"
        headers = {"x-goog-hash": f"crc32c=AAAAAA==,md5={digest}", "Content-Type": kind}
        content = self.fault.damaged(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not self.hub.ranges:
            self._answer(200, headers, content)
            return
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise RefusalError(416, "the range is outside the file")
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        self._answer(206, headers, content[start:stop])

    def _json(self, value: dict[str, Any], status: int = 200) -> None:
        headers = {"Content-Type": "application/json", "X-Kaggle-HubVersion": "99.0"}
        self._answer(status, headers, json.dumps(value).encode())

    def _answer(self, status: int, headers: Headers, body: bytes = b"") -> None:
        stalls = self.fault.stall is not None
        limit = self.fault.stall if stalls else self.fault.cut
        content = body[:limit]
        ranged, account = self.headers.get("Range", ""), self.headers.get("Authorization", "")
        self.hub.log.append(Request(self.line, ranged, account, len(content)))
        self.close_connection |= limit is not None
        if not stalls or content:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.send_body(content)
        if stalls:
            self.hub.closed.wait()
