"""Which weights a model has: one digest over the files that its plan reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from moorage_models.errors import ModelError, Reason
from moorage_models.sources.source import Repository

#: What may be known of a file's content, the strongest first: it was read as a whole; the hub
#: states its digest; the hub states none, and it is of a revision; its size and time of change.
KINDS = ("content", "hub", "revision", "stat")

_CONFIG = "config.json"
_METADATA = "_METADATA"  # an Orbax tree's shapes
_MAX_HEAD_BYTES = 32 << 20  # as of `headers`, which has refused what is longer


def claims_of(repository: Repository, names: Iterable[str]) -> dict[str, str]:
    """What is known of files, before they are read as a whole.

    Args:
        repository: Where they are.
        names: The files that hold the weights.

    Returns:
        By name, a kind and what it says, as `hub:sha256:...`. Those of the kind `stat` end in a
        digest of the file's header, or of a whole Orbax `_METADATA`. A `config.json` is among them,
        by its content, as it decides the numbers too; nothing if no weights are.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if a file cannot be read.
    """
    claims = {name: repository.claim(name) for name in names}
    for name, claim in claims.items():
        if _kind(claim) == "stat":
            claims[name] = f"{claim}:{_sha256(_head(repository, name))}"
    if claims and _CONFIG in repository.files:
        content = repository.read(_CONFIG, 0, repository.files[_CONFIG])
        claims[_CONFIG] = f"content:sha256:{_sha256(content)}"
    return claims


def require_unchanged(repository: Repository, claims: Mapping[str, str]) -> None:
    """Refuses weights of which something else was known when the checkpoint was opened.

    Raises:
        ModelError: CHECKPOINT_CORRUPT, naming the file.
    """
    for name, claim in claims.items():
        if name != _CONFIG and not f"{claim}:".startswith(f"{repository.claim(name)}:"):
            raise ModelError(
                Reason.CHECKPOINT_CORRUPT,
                f"{name} was changed since the checkpoint was looked into: load again",
            )


def combine(sizes: Mapping[str, int], claims: Mapping[str, str]) -> str:
    """One digest of what is known of several files.

    Args:
        sizes: Bytes of the files, and perhaps of others.
        claims: What is known of each.

    Returns:
        The weakest of the files' kinds, a colon, and the SHA-256 of a line for each file, in the
        order of the names: name, size, and what is known without its kind, with null bytes between
        them and a line feed at the end. Empty without files.
    """
    if not claims:
        return ""
    kind = max(map(_kind, claims.values()), key=KINDS.index)
    known = {name: claim.partition(":")[2] for name, claim in sorted(claims.items())}
    lines = [f"{name}\0{sizes[name]}\0{value}\n" for name, value in known.items()]
    content = "".join(lines).encode(errors="surrogateescape")  # a name need not be text
    return f"{kind}:{_sha256(content)}"


def _kind(claim: str) -> str:
    return claim.partition(":")[0]


def _head(repository: Repository, name: str) -> bytes:
    size = repository.files[name]
    if name.endswith(".safetensors"):
        size = min(8 + int.from_bytes(repository.read(name, 0, 8), "little"), size, _MAX_HEAD_BYTES)
    elif PurePosixPath(name).name != _METADATA:
        size = 0
    return repository.read(name, 0, size)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
