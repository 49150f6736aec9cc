"""Where checkpoints are kept: the protocol that every source answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path
from typing import Protocol, runtime_checkable

from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor

#: Small files that make the folder of a load a snapshot that other tools can use.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
)


class ModelSource(StrEnum):
    """The kinds of places that hold checkpoints."""

    HUGGINGFACE = "huggingface"
    KAGGLE = "kaggle"
    GCS = "gcs"
    INTERNAL = "internal"
    MAXTEXT = "maxtext"


@dataclass(frozen=True)
class ModelRequest:
    """Which model is wanted, as a caller says it.

    Attributes:
        model_id: A Hugging Face id or a config id.
        source: Where the checkpoint is kept.
        model_path: Where within the source; its meaning is the source's.
        revision: A branch, tag or commit; empty for the source's default.
        download_path: Where files are put; empty for the source's own cache.
        dtype: Dtype of the parameters; empty keeps what is stored.
        compute_dtype: Dtype of the arithmetic; empty takes the parameters'.
        options: What a checkpoint does not tell of itself, by name; see `families.maxtext`.
    """

    model_id: str
    source: ModelSource = ModelSource.HUGGINGFACE
    model_path: str = ""
    revision: str = ""
    download_path: str = ""
    dtype: str = ""
    compute_dtype: str = ""
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Policy:
    """What may be read, and how carefully.

    Attributes:
        sources: The sources that are allowed; None allows all.
        roots: Directories under which local paths must lie; None allows any.
        places: Patterns of what may be read of hubs and buckets, each a source and a place in it:
            `huggingface:google/*`, `gcs:my-bucket/models/*`; None allows any.
        verify: Whether a load that does not stream reads every byte of its files before it uses
            them: compares them with what a hub states once more, and makes a digest of the rest.
    """

    sources: tuple[ModelSource, ...] | None = None
    roots: tuple[Path, ...] | None = None
    places: tuple[str, ...] | None = None
    verify: bool = False

    @property
    def real_roots(self) -> tuple[Path, ...] | None:
        """The roots, without symbolic links."""
        return None if self.roots is None else tuple(root.resolve() for root in self.roots)

    def require(self, source: ModelSource, place: str) -> None:
        """Refuses a place on a hub that is not on the list.

        Args:
            source: The hub.
            place: The repository, handle or bucket and prefix.

        Raises:
            ModelError: SOURCE_NOT_ALLOWED.
        """
        name = f"{source.value}:{place}"
        if self.places is not None and not any(fnmatchcase(name, p) for p in self.places):
            raise ModelError(
                Reason.SOURCE_NOT_ALLOWED,
                f"{name} is not on this server's list (moorage serve --allow): "
                f"{', '.join(self.places) or 'nothing'}",
            )


def ignore(_: str) -> None:
    """For who does not wait for single files."""


@runtime_checkable
class Repository(Protocol):
    """One checkpoint's files at one revision: sizes and ranges first, whole files on demand."""

    @property
    def label(self) -> str:
        """Names the checkpoint in messages; never a path of the host."""
        ...

    @property
    def key(self) -> str:
        """Names the place within the source, without the revision; not shown to callers."""
        ...

    @property
    def revision(self) -> str:
        """The commit, version or digest that was resolved."""
        ...

    @property
    def local(self) -> Path | None:
        """The folder that holds the files already, if this machine does."""
        ...

    @property
    def files(self) -> Mapping[str, int]:
        """Sizes in bytes, by name relative to the checkpoint."""
        ...

    @property
    def roots(self) -> Sequence[Path] | None:
        """Directories under which the files must really lie; None allows any."""
        ...

    @property
    def contents(self) -> Mapping[str, str]:
        """SHA-256 of the files that `fetch` has read as a whole for want of a hub's digest."""
        ...

    def claim(self, name: str) -> str:
        """What is known of a file without reading it: one of `provenance.KINDS`, then what it says.

        Raises:
            ModelError: CHECKPOINT_CORRUPT if the file is gone.
        """
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a file, without fetching the rest where that is possible."""
        ...

    def request(self, name: str, start: int, stop: int) -> bytes:
        """As `read`, for who reads most of a file: nothing is kept of it."""
        ...

    @property
    def destination(self) -> Path:
        """The folder that `fetch` puts the files into."""
        ...

    def fetch(
        self, names: Sequence[str], monitor: LoadMonitor, arrived: Callable[[str], None] = ignore
    ) -> Path:
        """Brings whole files to this machine, and returns the folder they are in.

        Args:
            names: The files.
            monitor: Told of the bytes of the stage `fetch`.
            arrived: Told of each file that is there and verified.

        Raises:
            ModelError: SOURCE_UNAVAILABLE, DISK_FULL, SOURCE_AUTH_REQUIRED, CHECKPOINT_CORRUPT, or
                LOAD_CANCELLED.
        """
        ...


def within(name: str) -> bool:
    """Whether a name is that of a file in a folder or below it, and can be shown."""
    return name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


def cache_folder() -> Path:
    """Where files go that no hub's client has a cache for."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MOORAGE_CACHE") or user / "moorage")


def companions(names: Iterable[str]) -> list[str]:
    """The small files among a checkpoint's that make a folder of it usable by other tools."""
    return [n for n in names if "/" not in n and any(fnmatch(n, p) for p in _COMPANIONS)]
