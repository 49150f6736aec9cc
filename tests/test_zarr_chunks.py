"""Arrays that tensorstore wrote in every encoding, read in slabs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts

from moorage_models import zarr_chunks
from moorage_models.arena import Arena
from moorage_models.errors import ModelError, Reason
from moorage_models.layouts import StoredArray
from moorage_models.monitor import LoadMonitor
from moorage_models.zarr_chunks import ChunkedArray, ChunkedTree

VALUES = np.arange(7 * 6 * 5, dtype=np.float32).reshape(7, 6, 5)
TENSOR = StoredArray(("layer", "w"), "float32", VALUES.shape)

ZSTD = {"name": "zstd", "configuration": {"level": 1}}
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
BIG = {"name": "bytes", "configuration": {"endian": "big"}}


def grid(*shape: int) -> dict[str, Any]:
    return {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}}}


def sharded(*inner: int, codecs: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    """Chunks of 4 by 6 by 5, each an index and inner chunks."""
    index = [BYTES, {"name": "crc32c"}]
    configuration = {"chunk_shape": inner, "codecs": codecs or [BYTES, ZSTD], "index_codecs": index}
    return {
        **grid(4, 6, 5),
        "codecs": [{"name": "sharding_indexed", "configuration": configuration | more}],
    }


#: What the metadata says, by what is told apart; those with a `*` are left to tensorstore.
ENCODINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "v2 zstd, one chunk": ("zarr", {"chunks": (7, 6, 5), "compressor": {"id": "zstd"}}),
    "v2 zstd, edges": ("zarr", {"chunks": (3, 4, 5), "compressor": {"id": "zstd"}}),
    "v2 chunk above the shape": ("zarr", {"chunks": (9, 6, 8), "compressor": {"id": "zstd"}}),
    "v2 plain": ("zarr", {"chunks": (3, 6, 5), "compressor": None}),
    "v2 slashes": ("zarr", {"chunks": (3, 6, 5), "dimension_separator": "/", "compressor": None}),
    "v2 columns first *": ("zarr", {"chunks": (3, 4, 5), "order": "F", "compressor": None}),
    "v2 blosc *": ("zarr", {"chunks": (3, 4, 5), "compressor": {"id": "blosc"}}),
    "v2 big endian *": ("zarr", {"chunks": (3, 4, 5), "compressor": None, "dtype": ">f4"}),
    "v3 zstd": ("zarr3", {**grid(3, 4, 5), "codecs": [BYTES, ZSTD]}),
    "v3 plain": ("zarr3", {**grid(3, 4, 5), "codecs": [BYTES]}),
    "v3 gzip *": ("zarr3", {**grid(3, 4, 5), "codecs": [BYTES, {"name": "gzip"}]}),
    "v3 big endian *": ("zarr3", {**grid(3, 4, 5), "codecs": [BIG]}),
    "v3 v2 keys *": (
        "zarr3",
        {**grid(3, 4, 5), "codecs": [BYTES], "chunk_key_encoding": {"name": "v2"}},
    ),
    "v3 dots": (
        "zarr3",
        {
            **grid(3, 4, 5),
            "codecs": [BYTES],
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        },
    ),
    "v3 sharded, whole": ("zarr3", sharded(4, 6, 5)),
    "v3 sharded, small": ("zarr3", sharded(2, 3, 5)),
    "v3 sharded, plain": ("zarr3", sharded(2, 6, 5, codecs=[BYTES])),
    "v3 sharded, index first *": ("zarr3", sharded(2, 6, 5, index_location="start")),
}


def written(folder: Path, encoding: str, ocdbt: bool, values: np.ndarray = VALUES) -> ChunkedTree:
    driver, metadata = ENCODINGS[encoding]
    store: dict[str, Any] = {"driver": "file", "path": f"{folder}/layer.w/"}
    if ocdbt:
        store = {"driver": "ocdbt", "base": f"file://{folder}", "path": "layer.w/"}
    spec = {"driver": driver, "kvstore": store, "metadata": {"shape": VALUES.shape, **metadata}}
    spec["metadata"] |= (
        {"dtype": "<f4", "fill_value": 0} | dict(metadata) if driver == "zarr" else {}
    )
    spec["metadata"] |= {"data_type": "float32"} if driver == "zarr3" else {}
    ts.open(spec, create=True).result().write(values).result()
    (folder / "_METADATA").write_text(json.dumps({"use_zarr3": driver == "zarr3"}))
    return ChunkedTree(folder)


def stored_chunks(folder: Path) -> list[Path]:
    paths = (folder / "layer.w").rglob("*")
    return [path for path in paths if path.is_file() and path.name not in (".zarray", "zarr.json")]


def read(array: ChunkedArray) -> np.ndarray:
    """All slabs at their places; each value must come once."""
    found, times = np.zeros_like(VALUES), np.zeros(VALUES.shape, int)
    for start in array.starts:
        for begin, slab in array.slabs(start, Arena(), LoadMonitor().check):
            box = tuple(slice(b, b + size) for b, size in zip(begin, slab.shape, strict=True))
            found[box] = slab
            times[box] += 1
    assert (times == 1).all()
    return found


@pytest.fixture(params=[4, 100, 1 << 20], ids=lambda n: f"slabs of {n} bytes")
def slab_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_chunks, "SLAB_BYTES", request.param)
    monkeypatch.setattr(zarr_chunks, "_ENCODED_BYTES", 64)


@pytest.mark.usefixtures("slab_bytes")
@pytest.mark.parametrize("ocdbt", [False, True], ids=["files", "ocdbt"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_value_comes_once(encoding: str, ocdbt: bool, tmp_path: Path) -> None:
    tree = written(tmp_path, encoding, ocdbt)
    array = tree.open(TENSOR, ())
    assert (array._encoding is None) == encoding.endswith("*")
    assert np.array_equal(read(array), VALUES)


@pytest.mark.parametrize("encoding", ["v2 zstd, edges", "v3 sharded, small"])
def test_an_axis_that_must_be_whole_is(encoding: str, tmp_path: Path) -> None:
    array = written(tmp_path, encoding, True).open(TENSOR, (1,))
    assert {start[1] for start in array.starts} == {0}
    assert np.array_equal(read(array), VALUES)


@pytest.mark.parametrize("encoding", ["v2 zstd, edges", "v3 sharded, small", "v3 plain"])
def test_chunks_of_zeros_that_are_not_stored_are_zeros(encoding: str, tmp_path: Path) -> None:
    values = np.where(VALUES < 4 * 6 * 5, 0, VALUES).astype(np.float32)
    whole, partly = tmp_path / "whole", tmp_path / "partly"
    written(whole, encoding, False)
    array = written(partly, encoding, False, values).open(TENSOR, ())
    assert 0 < len(stored_chunks(partly)) < len(stored_chunks(whole))
    assert np.array_equal(read(array), values)


@pytest.mark.parametrize(
    ("encoding", "damage"),
    [
        *itertools.product(("v2 zstd, edges", "v3 zstd"), ("cut", "long", "reversed", "empty")),
        *itertools.product(("v3 sharded, small",), ("cut", "reversed", "empty")),
        *itertools.product(("v2 plain", "v3 plain"), ("cut", "long", "empty")),
    ],
)
def test_damage_is_told(encoding: str, damage: str, tmp_path: Path) -> None:
    tree = written(tmp_path, encoding, False)
    for path in stored_chunks(tmp_path):
        kept = path.read_bytes()
        damaged = {"cut": kept[:-1], "long": kept + kept, "reversed": kept[::-1], "empty": b""}
        path.write_bytes(damaged[damage])
    with pytest.raises(ModelError, match="array layer/w cannot be read") as caught:
        read(tree.open(TENSOR, ()))
    assert caught.value.reason is Reason.CHECKPOINT_CORRUPT
