"""How the chunks of a zarr array are kept, from what its metadata says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moorage_models.errors import ModelError, Reason

#: Of the codecs that tensorstore has, those that writers of checkpoints use.
CODECS = ("zstd", "gzip", "zlib", "blosc")

#: As decoded here; an array in others is read by tensorstore.
_PLAIN = ("", "zstd")

_FEW_CHUNKS = 256
_SMALL_CHUNK_BYTES = 4096


@dataclass(frozen=True)
class Encoding:
    """How the chunks of an array are kept.

    Attributes:
        outer: The shape of what lies under one key.
        inner: The shape of what is encoded as one; less than `outer` if there is an index.
        codec: One of `CODECS`; empty for none.
        key: The key of an outer chunk, from its place in their grid.
        plain: What comes out of the decoder are the values in their order, as Orbax writes them.
        index: Whether an index of the inner chunks is at the `start` or the `end` of the value;
            empty without one.
    """

    outer: tuple[int, ...]
    inner: tuple[int, ...]
    codec: str
    key: Callable[[Sequence[int]], str]
    plain: bool
    index: str = ""

    def require_fit(self, shape: Sequence[int], item_bytes: int) -> None:
        """Refuses chunks that are far larger than the array, or far too many.

        Args:
            shape: The array's.
            item_bytes: Bytes of one value.

        Raises:
            ValueError: The chunks do not fit.
        """
        size = math.prod(shape)
        if math.prod(self.outer) > 8 * size + 1024:
            raise ValueError(f"chunks of {list(self.outer)} for an array of {list(shape)}")
        count = math.prod(-(-s // c) for s, c in zip(shape, self.inner, strict=True))
        if count > _FEW_CHUNKS + size * item_bytes // _SMALL_CHUNK_BYTES:
            raise ValueError(f"{count} chunks for an array of {list(shape)}")


def encoding_of(driver: str, metadata: Mapping[str, Any]) -> Encoding:
    """How an array is kept.

    Args:
        driver: tensorstore's: `zarr` or `zarr3`.
        metadata: As tensorstore tells it.

    Raises:
        ModelError: CHECKPOINT_UNSUPPORTED for what no writer of checkpoints does.
    """
    return _READERS[driver](metadata)


def _zarr2(metadata: Mapping[str, Any]) -> Encoding:
    """Zarr storage specification version 2."""
    shape, compressor = tuple(metadata["chunks"]), metadata["compressor"] or {"id": ""}
    if metadata["filters"]:
        raise _unsupported("filters")
    separator, codec = metadata.get("dimension_separator", "."), _known(compressor["id"])
    in_order = metadata["order"] == "C" and not metadata["dtype"].startswith(">")
    return Encoding(shape, shape, codec, _joined(separator), in_order and codec in _PLAIN)


def _zarr3(metadata: Mapping[str, Any]) -> Encoding:
    """Zarr core specification version 3, and its sharding codec, of which Orbax makes use."""
    outer = inner = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    codecs, index = metadata["codecs"], ""
    if codecs[0]["name"] == "sharding_indexed":
        sharding = codecs[0]["configuration"]
        inner, codecs = tuple(sharding["chunk_shape"]), sharding["codecs"]
        index = sharding.get("index_location", "end")
        if [codec["name"] for codec in sharding["index_codecs"]] != ["bytes", "crc32c"]:
            raise _unsupported("its index")
    first, *rest = [codec["name"] for codec in codecs]
    if first != "bytes" or len(rest) > 1:
        raise _unsupported(", ".join([first, *rest]))
    codec = _known(rest[0] if rest else "")
    little = codecs[0].get("configuration", {}).get("endian", "little") == "little"
    keys = metadata["chunk_key_encoding"]
    prefix, separator = _KEYS[keys["name"]]
    key = _joined(keys.get("configuration", {}).get("separator", separator), *prefix)
    usual = keys["name"] == "default" and index != "start"
    return Encoding(outer, inner, codec, key, little and usual and codec in _PLAIN, index)


#: What keys begin with, and what separates their parts, by the name of an encoding.
_KEYS: Mapping[str, tuple[tuple[str, ...], str]] = {"default": (("c",), "/"), "v2": ((), ".")}

_READERS: Mapping[str, Callable[[Mapping[str, Any]], Encoding]] = {
    "zarr": _zarr2,
    "zarr3": _zarr3,
}


def _joined(separator: str, *prefix: str) -> Callable[[Sequence[int]], str]:
    return lambda at: separator.join([*prefix, *map(str, at)])


def _known(codec: str) -> str:
    if codec and codec not in CODECS:
        raise _unsupported(codec)
    return codec


def _unsupported(what: str) -> ModelError:
    return ModelError(
        Reason.CHECKPOINT_UNSUPPORTED,
        f"an array is encoded by {what}, which is not read: write it with Orbax, as zarr with "
        f"one of {', '.join(CODECS)} or nothing",
    )
