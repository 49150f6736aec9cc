"""Every hub as its client meets it, and one checkpoint on each of them alike."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from kagglesdk import kaggle_env

from downloads import contents, no_thread_fetches, sharded, until
from gcs import Gcs, fake_gcs_server
from hub import Hub
from kaggle_hub import Kaggle
from loopback import Fault, Loopback
from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.sources import (
    ModelRequest,
    ModelSource,
    gcs,
    gcs_prefix,
    kaggle,
    kaggle_api,
    remote,
)

FILES = sharded(4)
FILES_BYTES = sum(map(len, FILES.values()))
SHARD = "model-00003-of-00004.safetensors"

_STORED = "org/model/TRANSFORMERS/tiny"  # as Kaggle's API names the framework


@dataclass(frozen=True)
class Service:
    """A hub that serves FILES to the clients of this process, and of those that it starts.

    Attributes:
        hub: The hub.
        request: Asks for the checkpoint.
        stages: Patterns of the requests of a load, in their order: `listing`, then `config`, as
            the checkpoint is opened; `address`, then `content`, of SHARD, as it is fetched.
        access: What a message says to whom access is refused.
        refusals: How access is refused, as `gated` or `revoked`.
        cache: Where files are put.
    """

    hub: Loopback[Any]
    request: ModelRequest
    stages: Mapping[str, str]
    access: str
    refusals: Mapping[str, Callable[[pytest.MonkeyPatch], None]]
    cache: Path

    def open(self) -> Checkpoint:
        return open_checkpoint(self.request)

    def placed(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """The files that stand where a load would take them for whole."""
        partial = (".partial", ".incomplete")
        held = contents(checkpoint.repository.destination)
        return {name: held[name] for name in held if not name.endswith(partial)}

    def leftovers(self) -> list[Path]:
        """What is half fetched."""
        return [*self.cache.rglob("*.partial"), *self.cache.rglob("*.incomplete")]

    def start(self, count: int = 1) -> subprocess.Popen[str]:
        """Starts processes that fetch once their input ends; returns when all have opened."""
        command = [sys.executable, str(Path(__file__).with_name("hub_processes.py")), str(count)]
        command += [self.request.source.value, self.request.model_path]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        assert [process.stdout.readline() for _ in range(count)] == ["open\n"] * count
        return process


@contextmanager
def huggingface(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub goes to, with an empty cache; what waits, waits no time."""
    no_wait = SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic)
    with Hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        settings = {"ENDPOINT": hub.url, "HF_HUB_CACHE": folder / "cache"}
        settings |= {"HF_TOKEN_PATH": folder / "token"}
        for name, value in settings.items():
            patch.setattr(constants, name, str(value))
            patch.setenv(name if name.startswith("HF_") else f"HF_{name}", str(value))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.delenv("HF_TOKEN", raising=False)
        patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        patch.setattr("huggingface_hub.file_download.time", no_wait)
        patch.setattr("huggingface_hub.utils._http.time", no_wait)
        patch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
        yield hub
        huggingface_hub.close_session()


@contextmanager
def kagglehub(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Kaggle]:
    """A hub that Kaggle's client goes to, with an empty cache and no credential."""
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_API_ENVIRONMENT"):
        patch.delenv(name, raising=False)
    patch.setenv("HOME", str(folder / "home"))
    patch.setenv("KAGGLE_CONFIG_DIR", str(folder / "config"))
    patch.setenv("KAGGLEHUB_CACHE", str(folder / "cache"))
    patch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    patch.setattr(kaggle, "_PIECE_BYTES", 1 << 12)
    with Kaggle() as hub:
        patch.setenv("MOORAGE_KAGGLE_ENDPOINT", hub.url)
        patch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, hub.url)
        yield hub


@contextmanager
def bucket(patch: pytest.MonkeyPatch, folder: Path, server: str) -> Iterator[Gcs]:
    """The proxy that Google's client goes to, with an empty cache; small pieces, short waits."""
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "XDG_"))]:
        patch.delenv(name)
    patch.setenv("MOORAGE_CACHE", str(folder / "cache"))
    patch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    patch.setattr(gcs, "_PIECE_BYTES", 10_000)
    patch.setattr(gcs, "_PIECE_PAUSES", ())  # else it would hide whose attempt it is
    with Gcs(server) as proxy:
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


def set_timeouts(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """How long the hubs' clients wait for the next byte."""
    patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", seconds)
    patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", seconds)
    retried = "huggingface_hub.file_download._ETAG_RETRY_TIMEOUT"
    patch.setattr(retried, seconds, raising=False)  # which the first releases lack
    patch.setattr(kaggle_api, "TIMEOUT", (1.0, seconds))
    patch.setattr(gcs_prefix, "_TIMEOUT", (1.0, seconds))


@contextmanager
def _huggingface(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Service]:
    with huggingface(patch, folder) as hub:
        hub.push("org/tiny", FILES)
        yield Service(
            hub,
            ModelRequest("tiny", ModelSource.HUGGINGFACE, "org/tiny"),
            {
                "listing": "GET /api/*",
                "config": "GET /org/*/config.json",
                "address": f"HEAD /org/*/{SHARD}",
                "content": f"GET /cdn/*/{SHARD}",
            },
            "accept the terms on the model's page, and set HF_TOKEN on the server",
            {
                "gated": lambda patch: patch.setattr(hub.repos["org/tiny"], "gated", True),
                "revoked": lambda patch: patch.setenv("HF_TOKEN", "hf_stale"),
            },
            folder / "cache",
        )


@contextmanager
def _kaggle(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Service]:
    def revoke(patch: pytest.MonkeyPatch) -> None:
        patch.setenv("KAGGLE_USERNAME", "alice")
        patch.setenv("KAGGLE_KEY", "stale")

    with kagglehub(patch, folder) as hub:
        variation = hub.push(_STORED, FILES)
        yield Service(
            hub,
            ModelRequest("tiny", ModelSource.KAGGLE, "org/model/transformers/tiny"),
            {
                "listing": "POST List*",
                "config": "GET */config.json",
                "address": f"POST Download*/{SHARD}",
                "content": f"GET */{SHARD}",
            },
            "accept the licence on the model's page at Kaggle, and set KAGGLE_USERNAME",
            {
                "gated": lambda patch: patch.setattr(variation, "gated", True),
                "revoked": revoke,
            },
            folder / "cache",
        )


@contextmanager
def _gcs(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Service]:
    def refuse(status: int) -> Callable[[pytest.MonkeyPatch], None]:
        return lambda patch: patch.setattr(proxy, "faults", [Fault("*", status=status)])

    with fake_gcs_server() as server, bucket(patch, folder, server) as proxy:
        proxy.put("bucket", {f"tiny/{name}": content for name, content in FILES.items()})
        yield Service(
            proxy,
            ModelRequest("tiny", ModelSource.GCS, "gs://bucket/tiny"),
            {
                "listing": "LIST *",
                "config": "GET *config.json",
                "content": f"GET *{SHARD}",
            },
            "grant the server's service account roles/storage.objectViewer on the bucket",
            {"gated": refuse(403), "revoked": refuse(401)},
            folder / "cache",
        )


#: How each hub is started.
_STARTS: Mapping[str, Callable[[pytest.MonkeyPatch, Path], AbstractContextManager[Service]]] = {
    "huggingface": _huggingface,
    "kaggle": _kaggle,
    "gcs": _gcs,
}


HUBS = tuple(_STARTS)


@contextmanager
def serving(name: str, patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Service]:
    """One of HUBS, with the checkpoint; in the end what stalls is let go, and all threads end."""
    with _STARTS[name](patch, folder) as service:
        yield service
        service.hub.faults = []
        service.hub.closed.set()
        until(no_thread_fetches)
        gc.collect()  # a socket that was left open is told of here, not in a later test


def digests(output: str) -> list[dict[str, str]]:
    """The digests that started processes print of their files."""
    return [json.loads(line) for line in output.splitlines()]
