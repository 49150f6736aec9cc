"""A server trusts no path and no file: what it refuses, with which reason, and in what memory."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts

from checkpoints import GOLDEN, mesh_of
from hostile import (
    GIB,
    MIB,
    blosc_bomb,
    gzip_bomb,
    ocdbt_above,
    ocdbt_leaf,
    peak_bytes,
    refusal,
    varint,
    write_ocdbt_in_a_file,
    write_ocdbt_nodes,
    write_safetensors,
    write_sparse,
    write_tree,
    write_tree_metadata,
    zlib_bomb,
    zstd_bomb,
)
from moorage_models import headers
from moorage_models.arena import Arena
from moorage_models.automodel import load
from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.families import flax, maxtext
from moorage_models.headers import INDEX
from moorage_models.hf_config import read_config
from moorage_models.layouts import StoredArray
from moorage_models.monitor import LoadMonitor
from moorage_models.ocdbt import require_bounded
from moorage_models.orbax import read_tree
from moorage_models.orbax_plan import plan_tree
from moorage_models.sources import ModelRequest, ModelSource, Policy, Repository, open_repository
from moorage_models.zarr_chunks import ChunkedTree
from orbax_fixtures import write_flax, write_maxtext

CONFIG, WEIGHTS = "config.json", "model.safetensors"

pytestmark = pytest.mark.timeout(20)  # what hangs fails here


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a checkpoint in it, and a checkpoint beside it."""
    for folder in ("root", "secret"):
        shutil.copytree(GOLDEN / "llama3", tmp_path / folder / "model")
    return tmp_path / "root"


def look(root: Path, path: str = "model", download_path: str = "") -> Checkpoint:
    request = ModelRequest("tiny", ModelSource.INTERNAL, path, download_path=download_path)
    return open_checkpoint(request, Policy(roots=(root,)))


def opened(root: Path, path: str = "model") -> Repository:
    return open_repository(ModelRequest("tiny", ModelSource.INTERNAL, path), Policy(roots=(root,)))


# Paths and links


@pytest.mark.parametrize(
    "path",
    [
        *("file://{root}/model", "file:model", "gs://bucket/model", "http://localhost/model"),
        *("~/model", "$HOME", "%2e%2e/secret/model", "model|zip:x", "model/*"),
        "model\\..\\..\\secret",
    ],
)
def test_a_path_is_nothing_but_a_path(path: str, root: Path) -> None:
    path = path.format(root=root)
    assert refusal(lambda: look(root, path), path).reason is Reason.CHECKPOINT_NOT_FOUND


def linked(name: str, to: str) -> Callable[[Path], None]:
    """Puts a link in place of a file of the checkpoint."""

    def arrange(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(to.format(tmp=model.parent.parent))

    return arrange


def linked_twice(model: Path) -> None:
    linked("../hop", "../secret/model/config.json")(model)
    linked(CONFIG, "../hop")(model)


LINKS: Mapping[str, Callable[[Path], None]] = {
    "config": linked(CONFIG, "{tmp}/secret/model/config.json"),
    "relative": linked(CONFIG, "../../secret/model/config.json"),
    "by way of another link": linked_twice,
    "weights": linked(WEIGHTS, "{tmp}/secret/model/model.safetensors"),
    "index": linked(INDEX, "{tmp}/secret/model/config.json"),
    "tokenizer": linked("tokenizer_config.json", "{tmp}/secret/model/config.json"),
    "nowhere": linked(CONFIG, "{tmp}/secret/nothing"),
    "folder": linked("sub", "{tmp}/secret"),
    "device": linked(CONFIG, "/dev/zero"),
    "environment": linked("tokenizer.json", "/proc/self/environ"),
}


@pytest.mark.parametrize("arrange", LINKS.values(), ids=LINKS)
def test_a_link_out_of_the_roots_is_refused(arrange: Callable[[Path], None], root: Path) -> None:
    """Whether something is there does not show."""
    arrange(root / "model")
    assert refusal(lambda: look(root)).reason is Reason.SOURCE_NOT_ALLOWED


def pipe(name: str) -> Callable[[Path], None]:
    def arrange(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).parent.mkdir(exist_ok=True)
        os.mkfifo(model / name)

    return arrange


def bound_socket(model: Path) -> None:
    (model / CONFIG).unlink()
    here = os.getcwd()
    os.chdir(model)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(CONFIG)
    finally:
        os.chdir(here)


SPECIAL: Mapping[str, Callable[[Path], None]] = {
    "config": pipe(CONFIG),
    "weights": pipe(WEIGHTS),
    "index": pipe(INDEX),
    "tokenizer": pipe("tokenizer_config.json"),
    "tree": pipe("_METADATA"),
    "below": pipe("w/.zarray"),
    "socket": bound_socket,
}


@pytest.mark.parametrize("arrange", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_regular_file_is_refused(arrange: Callable[[Path], None], root: Path) -> None:
    arrange(root / "model")
    error = refusal(lambda: look(root))
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert "is not a regular file" in error.message


def test_a_device_is_refused_without_roots_too(root: Path) -> None:
    linked(CONFIG, "/dev/zero")(root / "model")
    request = ModelRequest("tiny", ModelSource.INTERNAL, str(root / "model"))
    error = refusal(lambda: open_checkpoint(request), root)
    assert error.reason is Reason.CHECKPOINT_CORRUPT


def test_a_folder_in_place_of_a_file_is_none(root: Path) -> None:
    (root / "model" / WEIGHTS).unlink()
    (root / "model" / WEIGHTS).mkdir()
    assert refusal(lambda: look(root)).reason is Reason.CHECKPOINT_NOT_FOUND


def test_a_name_that_is_no_text_is_told_all_the_same(root: Path) -> None:
    (root / "model" / os.fsdecode(b"\xff.json")).write_bytes(b"{}")
    look(root)
    os.rename(root / "model" / WEIGHTS, root / "model" / os.fsdecode(b"\xff.safetensors"))
    assert look(root).weights_digest.startswith("stat:")
    shutil.copy(GOLDEN / "llama3" / WEIGHTS, root / "model" / "two.safetensors")
    assert refusal(lambda: look(root)).reason is Reason.CHECKPOINT_NOT_FOUND


def test_folders_that_are_too_deep_for_a_path_are_left_out(root: Path) -> None:
    here, depth = os.getcwd(), 2100
    os.chdir(root / "model")
    try:
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        look(root)
        for _ in range(depth):  # no path leads to the last of them
            os.chdir("..")
            os.rmdir("d")
    finally:
        os.chdir(here)


def test_too_many_folders_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moorage_models.sources.internal._MAX_ENTRIES", 10)
    for i in range(10):
        (root / "model" / str(i)).mkdir()
    assert refusal(lambda: look(root)).reason is Reason.INVALID_REQUEST


# What is put in a file's place between a look at it and its use


def swap(path: Path, secret: Path) -> None:
    """Puts a link in a file's place, by which it seems to be the same."""
    stat = path.stat()
    os.utime(secret, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    path.unlink()
    path.symlink_to(secret)


def test_weights_that_become_a_link_are_refused(root: Path) -> None:
    checkpoint = look(root)
    swap(root / "model" / WEIGHTS, root.parent / "secret" / "model" / WEIGHTS)
    error = refusal(lambda: load(checkpoint, mesh_of(1, 1)))
    assert error.reason is Reason.SOURCE_NOT_ALLOWED


@pytest.mark.parametrize("download_path", ["", "copies"])
def test_weights_that_become_a_pipe_are_refused(download_path: str, root: Path) -> None:
    checkpoint = look(root, download_path=download_path)
    pipe(WEIGHTS)(root / "model")
    error = refusal(lambda: load(checkpoint, mesh_of(1, 1)))
    assert error.reason is Reason.CHECKPOINT_CORRUPT


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_that_appears_after_every_check_of_the_path_is_refused(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open, path = os.open, root / "model" / name

    def late_swap(file: Any, *args: Any, **kwargs: Any) -> int:
        if Path(file) == path and not path.is_symlink():
            swap(path, root.parent / "secret" / "model" / name)
        return really_open(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", late_swap)
    assert refusal(lambda: look(root)).reason is Reason.SOURCE_NOT_ALLOWED
    assert path.is_symlink()


# Download paths, through which a caller has files written


def victim(root: Path) -> Path:
    path = root.parent / "secret" / "victim"
    path.write_bytes(b"untouched")
    return path


DOWNLOAD_LINKS = ["copies", f"copies/{WEIGHTS}", f"copies/{WEIGHTS}.partial", "copies/sub"]


@pytest.mark.parametrize("name", DOWNLOAD_LINKS)
def test_a_download_path_with_a_link_out_of_the_roots_is_refused(name: str, root: Path) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(victim(root))
    error = refusal(lambda: look(root, download_path="copies"))
    assert error.reason is Reason.SOURCE_NOT_ALLOWED
    assert "copies" in error.message
    assert victim(root).read_bytes() == b"untouched"


@pytest.mark.parametrize("name", [WEIGHTS, f"{WEIGHTS}.partial", f"{CONFIG}.partial"])
def test_a_copy_is_not_written_through_a_link_that_appears_later(name: str, root: Path) -> None:
    checkpoint = look(root, download_path="copies")
    (root / "copies").mkdir()
    (root / "copies" / name).symlink_to(victim(root))
    checkpoint.repository.fetch([WEIGHTS], LoadMonitor())
    assert victim(root).read_bytes() == b"untouched"
    for copied in (WEIGHTS, CONFIG):
        assert not (root / "copies" / copied).is_symlink()
        same = (root / "model" / copied).read_bytes()
        assert (root / "copies" / copied).read_bytes() == same


def test_nor_through_a_link_that_appears_last_of_all(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, unlink = look(root, download_path="copies"), Path.unlink

    def then_planted(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        path.symlink_to(victim(root))

    monkeypatch.setattr(Path, "unlink", then_planted)
    error = refusal(lambda: checkpoint.repository.fetch([WEIGHTS], LoadMonitor()))
    assert error.reason is Reason.SOURCE_UNAVAILABLE
    assert (root.parent / "secret" / "victim").read_bytes() == b"untouched"


# Files that are too long, in little memory


def plant_index(model: Path, name: str) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))


def dense(opening: bytes, item: bytes, ending: bytes, nbytes: int = 31 * MIB) -> bytes:
    return opening + item * (nbytes // len(item)) + ending


def header_of(model: Path, content: bytes) -> None:
    write_safetensors(model / WEIGHTS, content)


LONG: Mapping[str, Callable[[Path], object]] = {
    "config": lambda m: write_sparse(m / CONFIG),
    "index": lambda m: write_sparse(m / INDEX),
    "generation config": lambda m: write_sparse(m / "generation_config.json"),
    "tokenizer config": lambda m: write_sparse(m / "tokenizer_config.json"),
    "header": lambda m: write_sparse(m / WEIGHTS, GIB + 8, GIB.to_bytes(8, "little")),
    "header beyond the file": lambda m: write_sparse(m / WEIGHTS, GIB, (GIB).to_bytes(8, "little")),
    "lists in the config": lambda m: (m / CONFIG).write_bytes(dense(b'{"a":[', b"[],", b"0]}")),
    "numbers in the index": lambda m: (m / INDEX).write_bytes(dense(b'{"a":[', b"999,", b"0]}")),
    "lists in the header": lambda m: header_of(m, dense(b'{"a":[', b"[],", b"0]}")),
    "lists in lists": lambda m: header_of(m, dense(b"", b"[", b"")),
    "objects in objects": lambda m: header_of(m, dense(b"", b'{"":', b"")),
}


@pytest.mark.parametrize("arrange", LONG.values(), ids=LONG)
def test_what_is_too_long_is_refused_in_little_memory(
    arrange: Callable[[Path], object], root: Path
) -> None:
    arrange(root / "model")
    errors: list[ModelError] = []
    assert peak_bytes(lambda: errors.append(refusal(lambda: look(root)))) < 64 * MIB
    assert errors[0].reason is Reason.CHECKPOINT_CORRUPT


def test_all_headers_together_are_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i}.safetensors" for i in range(8)]
    for name in names:
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        write_safetensors(root / "model" / name, {name: entry}, bytes(4))
    (root / "model" / INDEX).write_text(json.dumps({"weight_map": {n: n for n in names}}))
    monkeypatch.setattr(headers, "_MAX_HEADER_BYTES", 8 * 100)
    assert len(headers.read_headers(opened(root))) == 8
    monkeypatch.setattr(headers, "_MAX_HEADER_BYTES", 7 * 60)
    error = refusal(lambda: headers.read_headers(opened(root)))
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert "headers" in error.message


def test_a_config_that_asks_for_millions_of_tensors_is_refused_at_once(root: Path) -> None:
    shutil.copytree(GOLDEN / "qwen3_moe", root / "moe")
    raw = json.loads((root / "moe" / CONFIG).read_text())
    raw |= {"num_hidden_layers": 4096, "num_experts": 4096}
    (root / "moe" / CONFIG).write_text(json.dumps(raw))
    start = time.monotonic()
    assert refusal(lambda: look(root, "moe")).reason is Reason.CHECKPOINT_CORRUPT
    assert time.monotonic() - start < 1


# JSON that is read differently by different readers, or not at all


TEXT = (GOLDEN / "llama3" / CONFIG).read_text()
JSON: Mapping[str, bytes] = {
    "nested": b'{"a":' * 50_000 + b"0" + b"}" * 50_000,
    "a key twice": TEXT.replace("{", '{"vocab_size": 320,', 1).encode(),
    "not a number": TEXT.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": NaN').encode(),
    "infinite": TEXT.replace('"vocab_size": 320', '"vocab_size": 1e999').encode(),
    "minus infinity": TEXT.replace('"vocab_size": 320', '"vocab_size": -Infinity').encode(),
    "a hundred digits": TEXT.replace('"vocab_size": 320', f'"vocab_size": {10**100}').encode(),
    "a million digits": b'{"vocab_size": ' + b"9" * MIB + b"}",
    "sixteen bits": TEXT.encode("utf-16"),
    "a byte order mark": TEXT.encode("utf-8-sig"),
    "not text": b'{"\xff": 0}',
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_a_config_that_is_not_plain_is_refused(content: bytes, root: Path) -> None:
    assert content != TEXT.encode()
    (root / "model" / CONFIG).write_bytes(content)
    error = refusal(lambda: look(root))
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert CONFIG in error.message


# safetensors; more is in test_headers.py


def entry(begin: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


ONE = json.dumps(entry(0, 4, [1]))
HEADERS: Mapping[str, bytes | Mapping[str, Any]] = {
    "a name twice": f'{{"a": {ONE}, "a": {ONE}}}'.encode(),
    "a field twice": f'{{"a": {ONE[:-1]}, "shape": [1]}}}}'.encode(),
    "a billion values": {"a": entry(0, 4, [10**9])},
    "a product of 2 ** 64 and 1": {"a": entry(0, 4, [2**32, 2**32, 1])},
    "a product that wraps to the size": {"a": entry(0, 4, [2**63 + 1, 2**63 + 1])},
    "a size of 2 ** 63": {"a": entry(0, 4, [1]), "b": entry(4, 4, [2**63, 0])},
    "offsets of 2 ** 64": {"a": entry(2**64, 2**64 + 4, [1])},
    "a hundred axes": {"a": entry(0, 4, [1] * 100)},
    "a hundred thousand large axes": {"a": entry(0, 4, [10**9] * 100_000)},
    "sixteen bits": json.dumps({"a": entry(0, 4, [1])}).encode("utf-16"),
    "out of order with a hole": {"b": entry(8, 12, [1]), "a": entry(0, 4, [1])},
    "a digit too many": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, ' + b"4" * 5000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_misleads_is_refused(header: bytes | Mapping[str, Any], root: Path) -> None:
    write_safetensors(root / "model" / WEIGHTS, header, bytes(4))
    start = time.monotonic()
    error = refusal(lambda: look(root))
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert WEIGHTS in error.message
    assert time.monotonic() - start < 1


def test_a_dtype_that_is_unknown_is_named(root: Path) -> None:
    name = "model.norm.weight"
    whole = (root / "model" / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header[name]["dtype"] = "../../F32"
    write_safetensors(root / "model" / WEIGHTS, header, whole[8 + length :])
    error = refusal(lambda: look(root))
    assert error.reason is Reason.CHECKPOINT_UNSUPPORTED
    assert name in error.message


def test_half_a_character_in_a_name_can_be_told(root: Path) -> None:
    write_safetensors(root / "model" / WEIGHTS, {"\ud800": entry(0, 4, [1])}, bytes(4))
    error = refusal(lambda: look(root))
    assert error.reason is Reason.CHECKPOINT_MISMATCH
    assert "\\ud800" in error.message


INDEX_NAMES = ["../model.safetensors", "../../secret/model/model.safetensors", "/etc/passwd"]
INDEX_NAMES += ["{secret}/model.safetensors", "./model.safetensors", "x/../model.safetensors", ""]
INDEX_NAMES += ["model.safetensors\0", "MODEL.safetensors", "file:model.safetensors"]


@pytest.mark.parametrize("name", INDEX_NAMES)
def test_an_index_names_files_as_they_are_listed_or_is_refused(name: str, root: Path) -> None:
    name = name.format(secret=root.parent / "secret" / "model")
    plant_index(root / "model", name)
    assert refusal(lambda: look(root), name).reason is Reason.CHECKPOINT_CORRUPT


# Orbax trees


ONES = np.ones((4, 4), np.float32)


def tree_refusal(root: Path) -> ModelError:
    return refusal(lambda: read_all(opened(root, "tree")))


def read_all(repository: Repository, folder: str = ".") -> dict[str, np.ndarray]:
    """The arrays of a tree, by their keys."""
    assert repository.local is not None
    described, found = read_tree(repository, folder), {}
    tree = ChunkedTree(repository.local / folder)
    for key, tensor in described.items():
        array = tree.open(tensor, ())
        found[key] = np.zeros(tensor.shape, tensor.dtype)
        for start in array.starts:
            for begin, slab in array.slabs(start, Arena(), LoadMonitor().check):
                box = zip(begin, slab.shape, strict=True)
                found[key][tuple(slice(b, b + size) for b, size in box)] = slab
    return found


@pytest.mark.parametrize("ocdbt", [False, True], ids=["files", "ocdbt"])
def test_a_tree_by_hand_is_read(ocdbt: bool, root: Path) -> None:
    write_tree(root / "tree", {"transformer/decoder": ONES}, ocdbt=ocdbt)
    found = read_all(opened(root, "tree"))
    assert found.keys() == {"decoder"}
    np.testing.assert_array_equal(found["decoder"], ONES)


@pytest.mark.parametrize(
    "path",
    [
        ["../../secret/tree/decoder"],
        ["{secret}/tree/decoder"],
        ["/{secret}/tree/decoder"],
        ["decoder/../../../secret/tree/decoder"],
        ["/", "/secret"],
        ["decoder", "/../../secret/tree/decoder"],
        ["a\0b"],
        [""],
        [],
    ],
    ids=str,
)
def test_an_array_whose_name_leads_elsewhere_is_refused(path: list[str], root: Path) -> None:
    write_tree(root.parent / "secret" / "tree", {"decoder": ONES})
    write_tree(root / "tree", {"decoder": ONES})
    secret = str(root.parent / "secret")
    write_tree_metadata(root / "tree", [key.format(secret=secret) for key in path])
    assert tree_refusal(root).reason is Reason.CHECKPOINT_CORRUPT


@pytest.mark.parametrize("ocdbt", [False, True], ids=["files", "ocdbt"])
@pytest.mark.parametrize("folder", ["%2e%2e/secret", "a|b", "a?b", "a#b", "a b%", "{x}"])
def test_a_folder_is_not_taken_for_part_of_an_address(folder: str, ocdbt: bool, root: Path) -> None:
    write_tree(root.parent / "secret", {"decoder": 2 * ONES}, ocdbt=ocdbt)
    write_tree(root / folder, {"decoder": ONES}, ocdbt=ocdbt)
    np.testing.assert_array_equal(read_all(opened(root, folder))["decoder"], ONES)


TREE_LINKS = {"d": True, "decoder": False}


@pytest.mark.parametrize(("name", "ocdbt"), TREE_LINKS.items(), ids=TREE_LINKS)
@pytest.mark.parametrize(
    ("place", "reason"),
    [("secret", Reason.SOURCE_NOT_ALLOWED), ("root/other", Reason.CHECKPOINT_UNSUPPORTED)],
)
def test_a_linked_folder_in_a_tree_is_refused(
    name: str, ocdbt: bool, place: str, reason: Reason, root: Path
) -> None:
    for folder in (root.parent / place, root / "tree"):
        write_tree(folder, {"decoder": ONES}, ocdbt=ocdbt)
    shutil.rmtree(root / "tree" / name)
    (root / "tree" / name).symlink_to(root.parent / place / name)
    assert tree_refusal(root).reason is reason


def test_a_manifest_that_leads_out_is_refused(root: Path) -> None:
    """By tensorstore."""
    write_ocdbt_in_a_file(root / "own", "d/" + "0" * 32, ONES)
    np.testing.assert_array_equal(read_all(opened(root, "own"))["decoder"], ONES)
    write_ocdbt_in_a_file(root / "tree", "../../secret/" + "0" * 21, ONES)
    assert tree_refusal(root).reason is Reason.CHECKPOINT_CORRUPT


def zarray(shape: list[int], chunks: list[int], **more: Any) -> dict[str, Any]:
    plain = {"zarr_format": 2, "dtype": "<f4", "order": "C", "fill_value": 0, "filters": None}
    return {**plain, "compressor": None, "shape": shape, "chunks": chunks, **more}


CORRUPT, UNSUPPORTED = Reason.CHECKPOINT_CORRUPT, Reason.CHECKPOINT_UNSUPPORTED
ARRAYS: Mapping[str, tuple[Any, Reason]] = {
    "nested": ("[" * 100_000, CORRUPT),
    "no JSON": ("\0" * 1000, CORRUPT),
    "an endless shape": (zarray([2**62, 2**62], [1, 1]), CORRUPT),
    "a shape of 2 ** 64": (zarray([2**64], [1]), CORRUPT),
    "a negative shape": (zarray([-4, 4], [4, 4]), CORRUPT),
    "an endless chunk": (zarray([4, 4], [2**40, 4]), CORRUPT),
    "a billion chunks": (zarray([2**15, 2**15], [1, 1]), CORRUPT),
    "a chunk of nothing": (zarray([4, 4], [0, 4]), CORRUPT),
    "objects": (zarray([4, 4], [4, 4], dtype="|O"), CORRUPT),
    "an unknown codec": (zarray([4, 4], [4, 4], compressor={"id": "evil"}), CORRUPT),
    "bzip2": (zarray([4, 4], [4, 4], compressor={"id": "bz2", "level": 1}), UNSUPPORTED),
}


@pytest.mark.parametrize(("content", "reason"), ARRAYS.values(), ids=ARRAYS)
def test_an_array_that_cannot_be_is_refused(content: Any, reason: Reason, root: Path) -> None:
    (root / "tree" / "decoder").mkdir(parents=True)
    write_tree_metadata(root / "tree", ["decoder"])
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "tree" / "decoder" / ".zarray").write_text(text)
    errors: list[ModelError] = []
    assert peak_bytes(lambda: errors.append(tree_refusal(root))) < 64 * MIB
    assert errors[0].reason is reason


def test_an_array_says_nothing_of_where_it_is(root: Path) -> None:
    write_tree(root.parent / "secret" / "tree", {"decoder": 2 * ONES})
    write_tree(root / "tree", {"decoder": ONES})
    path = root / "tree" / "decoder" / ".zarray"
    elsewhere = {"driver": "file", "path": f"{root.parent}/secret/tree/decoder/"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kvstore": elsewhere}))
    np.testing.assert_array_equal(read_all(opened(root, "tree"))["decoder"], ONES)


LONG_TREE = {"_METADATA": False, "manifest.ocdbt": True, "decoder/.zarray": False}


@pytest.mark.parametrize(("name", "ocdbt"), LONG_TREE.items(), ids=LONG_TREE)
def test_what_is_too_long_in_a_tree_is_refused_in_little_memory(
    name: str, ocdbt: bool, root: Path
) -> None:
    write_tree(root / "tree", {"decoder": ONES}, ocdbt=ocdbt)
    write_sparse(root / "tree" / name, GIB, (root / "tree" / name).read_bytes())
    errors: list[ModelError] = []
    assert peak_bytes(lambda: errors.append(tree_refusal(root))) < 64 * MIB
    assert errors[0].reason is Reason.CHECKPOINT_CORRUPT


def test_a_database_of_many_nodes_is_read(root: Path) -> None:
    store = {"driver": "ocdbt", "base": f"file://{root}/tree", "path": "decoder/"}
    store["config"] = {"max_decoded_node_bytes": 200, "max_inline_value_bytes": 0}
    metadata = {"shape": (64, 4), "chunks": (1, 4), "dtype": "<f4", "compressor": None}
    spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
    values = np.arange(256, dtype=np.float32).reshape(64, 4)
    ts.open(spec, create=True).result().write(values).result()
    write_tree_metadata(root / "tree", ["decoder"])
    np.testing.assert_array_equal(read_all(opened(root, "tree"))["decoder"], values)
    for path in (root / "tree" / "d").iterdir():
        path.write_bytes(path.read_bytes()[::-1])
    assert tree_refusal(root).reason is CORRUPT


LEAF = ocdbt_leaf()
ZEROS = varint(32 * MIB) + bytes(128 * MIB)  # so many files with empty names
BOMB = ocdbt_leaf(ZEROS)


@pytest.mark.parametrize("nodes", [[LEAF], [LEAF, ocdbt_above(len(LEAF))]], ids=["leaf", "two"])
def test_a_database_by_hand_is_one(nodes: list[bytes], root: Path) -> None:
    """To tensorstore, so that those below are refused for what they become."""
    write_ocdbt_nodes(root / "tree", *nodes)
    require_bounded(root / "tree")
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{root}/tree/"}).result()
    assert store.list().result() == [b"decoder/"]


DATABASES: Mapping[str, tuple[list[bytes], bytes, str]] = {
    "a bomb for a manifest": ([LEAF], ZEROS, "too long"),
    "a bomb for a root": ([BOMB], b"", "too long"),
    "a bomb below the root": ([BOMB, ocdbt_above(len(BOMB))], b"", "too long"),
    "a child of a terabyte": ([LEAF, ocdbt_above(1 << 40)], b"", "too long"),
    "a child elsewhere": ([LEAF, ocdbt_above(100, b"../../secret/model/config.json")], b"", "else"),
    "a child that is no node": ([LEAF, ocdbt_above(40, b"_METADATA")], b"", "no manifest or node"),
    "a child that ends early": ([LEAF, ocdbt_above(len(LEAF) - 1)], b"", "cut short"),
    "a child that is not there": ([LEAF, ocdbt_above(100, b"d/gone")], b"", "No such file"),
}


@pytest.mark.parametrize(("nodes", "ending", "why"), DATABASES.values(), ids=DATABASES)
def test_a_database_that_becomes_far_more_is_refused_in_little_memory(
    nodes: list[bytes], ending: bytes, why: str, root: Path
) -> None:
    write_ocdbt_nodes(root / "tree", *nodes, manifest_ending=ending)
    errors: list[ModelError] = []
    assert peak_bytes(lambda: errors.append(tree_refusal(root))) < 64 * MIB
    assert errors[0].reason is CORRUPT
    assert why in f"{errors[0]} {errors[0].__cause__}"


def test_nodes_that_lead_to_one_another_come_to_an_end(root: Path) -> None:
    itself = ocdbt_above(len(ocdbt_above(100)))
    write_ocdbt_nodes(root / "tree", itself)
    assert tree_refusal(root).reason is CORRUPT


#: Chunks of 2 MiB that would become far more; those of columns first tensorstore decodes.
BOMBS: Mapping[str, tuple[str, str, Callable[[Path], bytes]]] = {
    "zstd": ("zstd", "C", lambda _: zstd_bomb(GIB)),
    "zstd, many frames": ("zstd", "C", lambda _: zstd_bomb(8 * MIB) * 128),
    "zstd, columns first": ("zstd", "F", lambda _: zstd_bomb(GIB)),
    "gzip": ("gzip", "C", lambda _: gzip_bomb(GIB)),
    "zlib, columns first": ("zlib", "F", lambda _: zlib_bomb(GIB)),
    "blosc": ("blosc", "C", lambda folder: blosc_bomb(128 * MIB, folder)),
}


@pytest.mark.parametrize(("codec", "order", "content"), BOMBS.values(), ids=BOMBS)
def test_a_chunk_that_becomes_far_more_is_refused_in_little_memory(
    codec: str, order: str, content: Callable[[Path], bytes], root: Path, tmp_path: Path
) -> None:
    (root / "tree" / "decoder").mkdir(parents=True)
    write_tree_metadata(root / "tree", ["decoder"])
    said = zarray([512, 1024], [512, 1024], compressor={"id": codec}, order=order)
    (root / "tree" / "decoder" / ".zarray").write_text(json.dumps(said))
    (root / "tree" / "decoder" / "0.0").write_bytes(content(tmp_path / "scratch"))
    errors: list[ModelError] = []
    assert peak_bytes(lambda: errors.append(tree_refusal(root))) < 64 * MIB
    assert errors[0].reason is Reason.CHECKPOINT_CORRUPT
    assert "array decoder cannot be read" in errors[0].message


def test_an_array_that_changed_since_the_look_is_refused(root: Path) -> None:
    write_tree(root / "tree", {"decoder": ONES})
    other = StoredArray(("decoder",), "float32", (4, 5))
    error = refusal(lambda: ChunkedTree(root / "tree").open(other, ()))
    assert error.reason is Reason.CHECKPOINT_CORRUPT


#: An array with fewer layers or parts than the model: what is not there would be whatever memory
#: held before.
SHORT: Mapping[str, tuple[str, int]] = {
    "decoder/layers/mlp/wi_0/kernel": ("qwen3_tied", 1),
    "layer_0/mlp/gating_einsum/w": ("gemma2", 0),
    "layer_1/attn/kv_einsum/w": ("gemma2", 0),
}


@pytest.mark.parametrize(("key", "case"), SHORT.items(), ids=SHORT)
def test_an_array_that_holds_too_little_is_refused(
    key: str, case: tuple[str, int], tmp_path: Path
) -> None:
    name, axis = case
    if name == "gemma2":
        folder = write_flax(GOLDEN / name, tmp_path)
    else:
        folder = write_maxtext(GOLDEN / name, tmp_path, scanned=True)
    repository = open_repository(ModelRequest("tiny", ModelSource.INTERNAL, str(folder)), Policy())
    config = read_config(json.loads((GOLDEN / name / CONFIG).read_text()))
    tree = read_tree(repository, ".")
    layout = flax.LAYOUTS.get(name) or maxtext.choose(config, "", {})
    assert layout is not None
    plan_tree(config, tree, layout)
    shape = list(tree[key].shape)
    shape[axis] -= 1
    tree[key] = replace(tree[key], shape=tuple(shape))
    error = refusal(lambda: plan_tree(config, tree, layout))
    assert error.reason is Reason.CHECKPOINT_MISMATCH
    assert key in error.message
