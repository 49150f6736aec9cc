"""Files that nobody would write in good faith, and the memory that looking at them takes."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore as ts
import zstandard

from moorage_models.errors import ModelError

MIB = 1 << 20
GIB = 1 << 30

#: What is unknown to the caller, and in no message.
SECRET = "secret"


def refusal(action: Callable[[], object], *given: object) -> ModelError:
    """The refusal of something, which tells of no path that the caller did not give."""
    with pytest.raises(ModelError) as caught:
        action()
    message = caught.value.message
    for path in filter(None, map(str, given)):
        message = message.replace(path, "").replace(repr(path)[1:-1], "")
    assert "/tmp" not in message
    assert "/proc" not in message
    assert SECRET not in message
    message.encode()
    return caught.value


def peak_bytes(action: Callable[[], object]) -> int:
    """By how much the memory of this process grows at most while something is done."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would be used again
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted
    before = _status_bytes("VmRSS")
    action()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) << 10


def write_sparse(path: Path, nbytes: int = GIB, content: bytes = b"") -> None:
    """A file of so many bytes that takes no room."""
    path.write_bytes(content)
    os.truncate(path, nbytes)


def write_safetensors(path: Path, header: bytes | Mapping[str, Any], data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def zstd_bomb(nbytes: int) -> bytes:
    """A frame of zeros."""
    compressor = zstandard.ZstdCompressor().compressobj()
    parts = [compressor.compress(bytes(MIB)) for _ in range(nbytes // MIB)]
    return b"".join(parts) + compressor.flush()


def gzip_bomb(nbytes: int) -> bytes:
    """One gzip stream of zeros, of blocks that do not refer to one another."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    header = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    return header + block * -(-nbytes // MIB) + deflate.flush() + bytes(8)


def zlib_bomb(nbytes: int) -> bytes:
    """The same as a zlib stream."""
    return b"\x78\x9c" + gzip_bomb(nbytes)[10:-4]


def blosc_bomb(nbytes: int, folder: Path) -> bytes:
    """A chunk of zeros as tensorstore writes it; the folder is used meanwhile."""
    said = {"shape": (nbytes,), "chunks": (nbytes,), "dtype": "|u1", "fill_value": 1}
    said |= {"compressor": {"id": "blosc"}}
    store = {"driver": "file", "path": f"{folder}/"}
    spec = {"driver": "zarr", "kvstore": store, "metadata": said}
    ts.open(spec, create=True).result().write(np.zeros(nbytes, np.uint8)).result()
    return (folder / "0").read_bytes()


def write_tree(folder: Path, arrays: Mapping[str, np.ndarray], *, ocdbt: bool = False) -> None:
    """An Orbax tree by hand: a key a path, its parts joined by dots; zarr v2."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        store: dict[str, Any] = {"driver": "file", "path": f"{folder}/{name}/"}
        if ocdbt:
            base = {"driver": "file", "path": f"{folder}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        metadata = {"shape": array.shape, "dtype": array.dtype.str, "compressor": {"id": "zstd"}}
        spec = {"driver": "zarr", "kvstore": store, "metadata": metadata | {"chunks": array.shape}}
        ts.open(spec, create=True).result().write(array).result()
    write_tree_metadata(folder, *([name] for name in arrays))


def write_ocdbt_in_a_file(folder: Path, name: str, array: np.ndarray) -> None:
    """A tree of one array, `decoder`, whose manifest says that its root is in a file.

    Args:
        folder: The tree.
        name: The file, of 34 bytes, from there; it is written as well.
        array: The array.
    """
    base = {"driver": "file", "path": f"{folder}/"}
    plain = {"compression": None, "max_inline_value_bytes": 0}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": plain}).result()
    said = {"zarr_format": 2, "dtype": array.dtype.str, "order": "C", "fill_value": 0}
    said |= {"filters": None, "compressor": None, "shape": array.shape, "chunks": array.shape}
    with ts.Transaction() as transaction:
        for key, value in ((".zarray", json.dumps(said).encode()), ("0.0", array.tobytes())):
            store.with_transaction(transaction).write(f"decoder/{key}", value).result()
    (data,) = (folder / "d").iterdir()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data.read_bytes())
    manifest = (folder / "manifest.ocdbt").read_bytes()[:-4]
    changed = manifest.replace(f"d/{data.name}".encode(), name.encode())
    assert manifest != changed
    assert len(manifest) == len(changed)
    checksum = google_crc32c.value(changed).to_bytes(4, "little")
    (folder / "manifest.ocdbt").write_bytes(changed + checksum)
    write_tree_metadata(folder, ["decoder"])


def ocdbt_part(magic: bytes, content: bytes, compressed: bool = True) -> bytes:
    """A manifest or a node, by the documented format."""
    body = zstandard.ZstdCompressor(level=1).compress(content) if compressed else content
    part = magic + (len(body) + 18).to_bytes(8, "little") + bytes([0, compressed]) + body
    return part + google_crc32c.value(part).to_bytes(4, "little")


def write_ocdbt_nodes(folder: Path, *nodes: bytes, manifest_ending: bytes = b"") -> None:
    """A tree of nodes in one file, of which the last is the root of the only version.

    Args:
        folder: The tree.
        nodes: From the leaf upwards.
        manifest_ending: What follows the configuration in place of the version.
    """
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "node").write_bytes(b"".join(nodes))
    length, height = varint(len(nodes[-1])), bytes([len(nodes) - 1])
    offset = varint(sum(map(len, nodes[:-1])))
    files = b"\x01\x06\x00d/node"
    place = b"\x00" + offset + length
    version = b"\x01\x01" + height + place + b"\x01" + length + b"\x00" + bytes(8)
    config = bytes(16) + b"\x00\x00" + varint(8 * MIB) + b"\x04\x00"
    content = config + (manifest_ending or files + version + b"\x00")
    (folder / "manifest.ocdbt").write_bytes(ocdbt_part(b"\x0c\xdb\x3a\x2a", content))
    write_tree_metadata(folder, ["decoder"])


def ocdbt_leaf(content: bytes = b"", compressed: bool = True) -> bytes:
    """A leaf that holds one empty value, `decoder/`; or something else."""
    return ocdbt_part(
        b"\x0c\xdb\x20\xde",
        b"\x00" + (content or b"\x00\x01\x08decoder/\x00\x00"),
        compressed,
    )


def ocdbt_above(nbytes: int, name: bytes = b"d/node", offset: int = 0) -> bytes:
    """A node above one leaf."""
    files = b"\x01" + varint(len(name)) + b"\x00" + name
    child = b"\x00" + varint(offset) + varint(nbytes) + b"\x01\x01\x00"
    content = b"\x01" + files + b"\x01\x08\x00decoder/" + child
    return ocdbt_part(b"\x0c\xdb\x20\xde", content, compressed=False)


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def write_tree_metadata(folder: Path, *paths: list[str]) -> None:
    """What Orbax says of a tree of arrays."""
    tree = {
        str(tuple(path)): {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for path in paths
    }
    said = {"tree_metadata": tree, "use_zarr3": False, "custom_metadata": None}
    (folder / "_METADATA").write_text(json.dumps(said))
