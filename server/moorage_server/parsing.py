"""From the text of a setting to its value. Each function raises ValueError with what was wanted."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moorage_models.sources import ModelRequest, ModelSource
from moorage_server.engine.outputs import Profile

_MIN_WINDOW_MIB = 96  # the reads that are under way take up to 64
_MAX_COUNT = 2**31 - 1  # gRPC takes no more
_MAX_PORT = 2**16 - 1
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_UNITS = {"MiB": 1 << 20, "GiB": 1 << 30, None: 1}
_FIELDS = {
    "model_id": "model_id",
    "model_path": "model_path",
    "revision": "revision",
    "model_download_path": "download_path",
    "dtype": "dtype",
    "compute_dtype": "compute_dtype",
}


def switch(given: Any) -> bool:
    """A yes or a no."""
    if not isinstance(given, bool):
        raise ValueError("wanted true or false")
    return given


def array(given: Any) -> Sequence[Any]:
    """A list."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError("wanted a list")
    return given


def text(given: Any) -> str:
    """Text; a number as it is written."""
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ValueError("wanted text")
    return str(given)


def choice(given: Any, *allowed: str) -> str:
    """One of some words."""
    if given not in allowed:
        raise ValueError(f"wanted one of {', '.join(allowed)}")
    return str(given)


def count(given: Any) -> int:
    """A whole number above zero."""
    if not text(given).isdecimal() or int(given) < 1:
        raise ValueError("wanted a whole number above 0")
    if int(given) > _MAX_COUNT:
        raise ValueError(f"wanted at most {_MAX_COUNT}")
    return int(given)


def seconds(given: Any) -> float:
    """A time."""
    try:
        found = float(text(given))
    except ValueError as error:
        raise ValueError("wanted seconds") from error
    if not 0 <= found < float("inf"):
        raise ValueError("wanted seconds")
    return found


def path(given: Any) -> Path | None:
    """A path; none if it is empty."""
    try:
        return Path(text(given)).expanduser() if given else None
    except RuntimeError as error:
        raise ValueError("there is no such user") from error


def file(given: Any) -> Path | None:
    """A file that can be read; none if it is empty."""
    found = path(given)
    if found and not found.is_file():
        raise ValueError("there is no such file")
    return found


def folder(given: Any) -> Path:
    """A directory."""
    found = path(given)
    if found is None or not found.is_dir():
        raise ValueError("is not a directory")
    return found.resolve()


def address(given: Any) -> str:
    """`host:port`, `[::1]:port` or `unix:path`."""
    found = text(given)
    match = re.fullmatch(r"unix:.+|(?:\[[^\]]+\]|[^:]+):([0-9]{1,5})", found)
    if not match:
        raise ValueError("it is not host:port")
    if int(match[1] or 0) > _MAX_PORT:
        raise ValueError(f"ports go up to {_MAX_PORT}")
    return found


def address_or_none(given: Any) -> str:
    """An address, or nothing."""
    return address(given) if given else ""


def is_local(where: str) -> bool:
    """Whether only this machine can reach an address."""
    if where.startswith("unix:"):
        return True
    host = where.rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def mesh(given: Any) -> dict[str, int]:
    """`fsdp=2,tp=4` as sizes of axes."""
    sizes = {}
    for part in text(given).split(",") if given else []:
        name, _, size = part.partition("=")
        if name not in ("fsdp", "tp") or not size.isdecimal() or int(size) < 1:
            raise ValueError("wanted axes fsdp and tp, as fsdp=2,tp=4")
        if name in sizes:
            raise ValueError(f"{name} is there twice")
        sizes[name] = int(size)
    return sizes


def memory(given: Any) -> float:
    """`0.9` as a fraction, `12GiB` as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(MiB|GiB)?", text(given))
    amount = float(match[1]) if match else 0.0
    if not match or amount <= 0 or (match[2] is None and amount > 1):
        raise ValueError("wanted a fraction up to 1, as 0.9, or an amount, as 12GiB")
    return amount * _UNITS[match[2]]


def window(given: Any) -> int:
    """`256` as bytes."""
    if count(given) < _MIN_WINDOW_MIB:
        raise ValueError(f"wanted at least {_MIN_WINDOW_MIB} MiB")
    return int(given) << 20


def profiles(given: Any, outputs: Container[str], every: Iterable[Profile]) -> tuple[Profile, ...]:
    """`logprobs,top_k` as the programs that give no others; all of them if it is empty.

    Args:
        given: The text.
        outputs: The names that there are.
        every: The programs that there are.
    """
    names = text(given).split(",") if given else []
    if unknown := [name for name in names if name not in outputs]:
        raise ValueError(f"{unknown[0]!r} is none of the outputs")
    return tuple(profile for profile in every if not names or profile.outputs[-1] in names)


def buckets(given: Any) -> tuple[tuple[int, int], ...]:
    """`1x128,8x512` as rows and lengths."""
    found = []
    for part in text(given).split(","):
        rows, _, length = part.partition("x")
        sizes = [int(x) if x.isdecimal() else 0 for x in (rows, length)]
        if sizes[0] not in _ROWS or sizes[1] % 128 or not sizes[1]:
            raise ValueError(
                "rows are a power of two up to 128, lengths multiples of 128, as 1x128,8x512"
            )
        found.append((sizes[0], sizes[1]))
    return tuple(found)


def model(given: Any) -> ModelRequest:
    """`google/gemma-2-2b-it`, or with more, as `...,dtype=bfloat16`, or a table of the same."""
    wanted = dict(given) if isinstance(given, Mapping) else _pairs(text(given))
    source = text(wanted.pop("source", "huggingface")).upper()
    options = wanted.pop("options", {})
    if unknown := wanted.keys() - _FIELDS:
        raise ValueError(f"{min(unknown)!r} is none of source, options, {', '.join(_FIELDS)}")
    if source not in ModelSource.__members__:
        raise ValueError(f"{source.lower()!r} is no source")
    if "model_id" not in wanted or not isinstance(options, Mapping):
        raise ValueError("wanted at least a model_id, and options as a table")
    return ModelRequest(
        source=ModelSource[source],
        options=tuple(sorted((name, text(value)) for name, value in options.items())),
        **{_FIELDS[name]: text(value) for name, value in wanted.items()},
    )


def _pairs(given: str) -> dict[str, Any]:
    first, *rest = given.split(",")
    named = rest if "=" not in first else [first, *rest]
    pairs: dict[str, Any] = {"model_id": first} if "=" not in first else {}
    for part in named:
        name, _, value = part.partition("=")
        pairs[name] = value
    return pairs
