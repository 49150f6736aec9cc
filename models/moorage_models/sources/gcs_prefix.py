"""A folder of objects in a Google Cloud Storage bucket, as `google-cloud-storage` answers."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import google.auth
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import (
    DefaultCredentialsError,
    InvalidOperation,
    RefreshError,
    TransportError,
)
from google.cloud import storage

from moorage_models.errors import ModelError, Reason
from moorage_models.sources.failures import Failures
from moorage_models.sources.record import RemoteFile
from moorage_models.sources.source import within

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_MAX_OBJECTS = 20_000
_TIMEOUT = (5.0, 20.0)  # seconds to connect, and between two arrivals

# Else each client asks for the bucket's metadata as well, in a thread of its own.
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")

_ACCESS = (
    "grant the server's service account roles/storage.objectViewer on the bucket, or set "
    "GOOGLE_APPLICATION_CREDENTIALS on the server to the key of an account that may read it"
)

FAILURES = Failures(
    title="Google Cloud Storage",
    cache_setting="MOORAGE_CACHE",
    credential="the server's Google credential",
    access=_ACCESS,
    errors=(
        (
            exceptions.BadRequest,
            Reason.CHECKPOINT_NOT_FOUND,
            "the request is refused: check the bucket's name; one whose requester pays cannot be "
            "read",
        ),
        (
            exceptions.NotFound,
            Reason.CHECKPOINT_NOT_FOUND,
            "there is no such bucket: check the path",
        ),
        (
            InvalidOperation,  # what the client makes of a 401 if it has none to renew
            Reason.SOURCE_AUTH_REQUIRED,
            f"it is not public, and the server has no Google credential: {_ACCESS}",
        ),
        (
            DefaultCredentialsError,
            Reason.SOURCE_AUTH_REQUIRED,
            f"GOOGLE_APPLICATION_CREDENTIALS names no credential that can be used: {_ACCESS}",
        ),
        (
            RefreshError,
            Reason.SOURCE_AUTH_REQUIRED,
            f"the server's Google credential cannot be renewed: {_ACCESS}",
        ),
        (
            TransportError,
            Reason.SOURCE_UNAVAILABLE,
            "nothing gives out the server's Google credential: try later, or set "
            "GOOGLE_APPLICATION_CREDENTIALS on the server",
        ),
    ),
    wrappers=(RefreshError, TransportError),
)

#: How the bucket answers for an object that was written or removed since it was listed.
_CHANGED = (
    exceptions.NotFound,
    exceptions.PreconditionFailed,
    exceptions.RequestRangeNotSatisfiable,
)


@dataclass(frozen=True)
class Object:
    """What a bucket tells of an object.

    Attributes:
        generation: Its generation: another one is another content.
        file: Its size and digest.
        encoding: Its Content-Encoding; empty for none.
    """

    generation: int
    file: RemoteFile
    encoding: str = ""


@dataclass(frozen=True)
class Prefix:
    """The objects of a bucket whose names begin alike, as a folder.

    Attributes:
        bucket: The bucket.
        name: What the names begin with, without the `/` after it.
    """

    bucket: str
    name: str
    _local: threading.local = field(default_factory=threading.local, repr=False, compare=False)

    @property
    def key(self) -> str:
        """`bucket/prefix`."""
        return f"{self.bucket}/{self.name}"

    def objects(self) -> dict[str, Object]:
        """The objects, by name within the prefix; one that leads out of a folder is left out.

        Raises:
            ModelError: CHECKPOINT_NOT_FOUND if there are none; INVALID_REQUEST if there are more
                than a checkpoint has.
        """
        blobs = self._client().list_blobs(
            self.bucket,
            prefix=f"{self.name}/",
            max_results=_MAX_OBJECTS + 1,
            fields="items(name,size,crc32c,generation,contentEncoding),nextPageToken",
            timeout=_TIMEOUT,
            retry=None,
        )
        listed = {blob.name[len(self.name) + 1 :]: blob for blob in blobs}
        if len(listed) > _MAX_OBJECTS:
            raise ModelError(
                Reason.INVALID_REQUEST,
                f"gs://{self.key} holds more than {_MAX_OBJECTS} objects: name the checkpoint "
                "itself",
            )
        found = {name: _object(blob) for name, blob in listed.items() if within(name)}
        if not found:
            raise ModelError(
                Reason.CHECKPOINT_NOT_FOUND,
                f"gs://{self.key} holds no objects: check the path, which names a folder",
            )
        return found

    def revision(self, objects: Mapping[str, Object]) -> str:
        """A digest of the objects' names, generations and sizes."""
        digest = hashlib.sha256(f"{self.key}\n".encode())
        for name, found in sorted(objects.items()):
            digest.update(f"{name}\0{found.generation}\0{found.file.size}\n".encode())
        return digest.hexdigest()[:16]

    def download(
        self,
        name: str,
        generation: int,
        span: range,
        advance: Callable[[int], None],
    ) -> bytes:
        """A range of one generation of an object, by one request.

        Args:
            name: The object, within the prefix.
            generation: The generation.
            span: The bytes.
            advance: Told of the bytes as they arrive, and of all of them taken back on failure.

        Raises:
            ModelError: CHECKPOINT_CORRUPT if that generation is there no more.
        """
        if not span:
            return b""
        blob = self._client().bucket(self.bucket).blob(f"{self.name}/{name}", generation=generation)
        arriving = _Arriving(advance)
        try:
            blob.download_to_file(
                arriving,
                start=span.start,
                end=span.stop - 1,
                raw_download=True,
                if_generation_match=generation,
                timeout=_TIMEOUT,
                checksum=None,  # a range has none; the whole file is verified
                retry=None,  # `persist` tries again, and knows when the load is over
            )
            if len(content := arriving.getvalue()) != len(span):
                raise OSError(f"{name} was answered with {len(content)} of {len(span)} bytes")
        except _CHANGED as error:
            raise _changed(name) from error
        except Exception:
            advance(-arriving.tell())
            raise
        if blob.generation != generation:
            raise _changed(name)
        return content

    def _client(self) -> Any:
        """This thread's client, which has no types: its session is for one thread."""
        if not hasattr(self._local, "client"):
            self._local.client = storage.Client(project=None, credentials=self._credentials)
        return self._local.client

    @cached_property
    def _credentials(self) -> Credentials:
        """The application's default credentials; without any, as for public buckets, none."""
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            return AnonymousCredentials()
        try:
            return google.auth.default(scopes=[_SCOPE])[0]
        except DefaultCredentialsError:
            if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                raise
            return AnonymousCredentials()


def _object(blob: Any) -> Object:
    digest = f"crc32c:{base64.b64decode(blob.crc32c).hex()}" if blob.crc32c else ""
    return Object(blob.generation, RemoteFile(blob.size, digest), blob.content_encoding or "")


def _changed(name: str) -> ModelError:
    return ModelError(
        Reason.CHECKPOINT_CORRUPT, f"{name} was changed while it was read: load again"
    )


class _Arriving(io.BytesIO):
    """Bytes that the client writes as they arrive."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        super().__init__()
        self._advance = advance

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        self._advance(len(data))
        return super().write(data)
