"""Headers of safetensors files: those the library writes are read right, damaged ones refused."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from checkpoints import GOLDEN, VARIANTS, stored_tensors
from moorage_models.errors import ModelError, Reason
from moorage_models.headers import INDEX, StoredTensor, read_headers, read_json
from moorage_models.sources import ModelRequest, ModelSource, Policy, open_repository
from moorage_models.sources.internal import Directory

FILE = "model.safetensors"
MIXED = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(4, dtype=ml_dtypes.bfloat16).reshape(4, 1),
    "c.weight": np.arange(5, dtype=np.float16),
    "empty": np.zeros((0, 7), np.float32),
    "scalar": np.array(3.5, np.float32),
}

Header = dict[str, Any]


def opened(folder: Path) -> Any:
    request = ModelRequest("tiny", ModelSource.INTERNAL, str(folder))
    return open_repository(request, Policy())


def headers(folder: Path) -> dict[str, StoredTensor]:
    return read_headers(opened(folder))


def bytes_of(folder: Path, tensor: StoredTensor) -> bytes:
    whole = (folder / tensor.file).read_bytes()
    return whole[tensor.offset : tensor.offset + tensor.nbytes]


def refusal(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        headers(folder)
    return caught.value


def write(folder: Path, header: object, data: bytes, name: str = FILE) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin: object, stop: object, shape: object = (1,), dtype: object = "F32") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_what_the_library_writes_is_read_right(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / FILE, metadata={"format": "pt"})
    found = headers(tmp_path)
    assert found.keys() == MIXED.keys()
    for name, array in MIXED.items():
        tensor = found[name]
        assert (tensor.name, tensor.file, tensor.dtype) == (name, FILE, array.dtype.name)
        assert tensor.shape == array.shape
        assert tensor.nbytes == array.nbytes
        assert bytes_of(tmp_path, tensor) == array.tobytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_golden_checkpoints_are_read_right(name: str) -> None:
    found, wanted = headers(GOLDEN / name), stored_tensors(GOLDEN / name)
    assert found.keys() == wanted.keys()
    for key, array in wanted.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype.name, array.shape)
        assert bytes_of(GOLDEN / name, found[key]) == array.tobytes()


def test_a_quantised_dtype_is_kept_for_the_plan_to_judge(tmp_path: Path) -> None:
    write(tmp_path, {"q": entry(0, 3, [3], "F8_E4M3"), "x": entry(3, 7)}, bytes(7))
    assert headers(tmp_path)["q"].dtype == "F8_E4M3"


A, B = entry(0, 4), entry(4, 8)
DAMAGED: dict[str, tuple[object, int]] = {
    "extra bytes": ({"a": A, "b": B}, 9),
    "cut short": ({"a": A, "b": B}, 7),
    "gap before the first": ({"a": entry(4, 8)}, 8),
    "gap": ({"a": A, "b": entry(5, 9)}, 9),
    "overlap": ({"a": A, "b": entry(2, 6)}, 6),
    "one place for two": ({"a": A, "b": A}, 4),
    "negative offsets": ({"a": entry(-4, 0)}, 0),
    "backwards": ({"a": entry(4, 0)}, 4),
    "negative shape": ({"a": entry(0, 4, [-1, -1])}, 4),
    "more bytes than the shape": ({"a": entry(0, 8)}, 8),
    "fewer bytes than the shape": ({"a": entry(0, 4, [2])}, 4),
    "offsets as text": ({"a": entry("0", "4")}, 4),
    "offsets as fractions": ({"a": entry(0.0, 4.0)}, 4),
    "offsets without end": ({"a": entry(0, math.inf)}, 4),
    "offsets of another number": ({"a": A | {"data_offsets": [0, 4, 4]}}, 4),
    "shape as text": ({"a": entry(0, 4, "1")}, 4),
    "shape of text": ({"a": entry(0, 4, ["1"])}, 4),
    "shape of fractions": ({"a": entry(0, 4, [1.0])}, 4),
    "shape of switches": ({"a": entry(0, 4, [True])}, 4),
    "shape of nothing": ({"a": entry(0, 4, None)}, 4),
    "dtype of a number": ({"a": entry(0, 4, dtype=32)}, 4),
    "dtype of a list": ({"a": entry(0, 4, dtype=["F32"])}, 4),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4),
    "an entry that is no object": ({"a": [0, 4]}, 4),
    "a list": ([A], 4),
    "a number": (5, 0),
    "not JSON": (b"{'a'", 0),
    "not text": (b"\xff\xfe\xfd", 0),
    "empty": (b"", 0),
    "nested too deeply": (b"[" * 200_000, 0),
}


@pytest.mark.parametrize(("header", "size"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused(header: object, size: int, tmp_path: Path) -> None:
    write(tmp_path, header, bytes(size))
    error = refusal(tmp_path)
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert FILE in error.message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02\x00\x00",
        (2**63 + 5).to_bytes(8, "little") + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
    ],
    ids=["nothing", "less than a length", "huge", "terabyte", "longer than the file"],
)
def test_a_length_that_cannot_be_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert refusal(tmp_path).reason is Reason.CHECKPOINT_CORRUPT


@pytest.mark.parametrize("name", [FILE, INDEX])
def test_what_is_too_long_for_a_header_is_not_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length fits the file, which is sparse: reading it would take memory for nothing."""
    (tmp_path / name).write_bytes((200_000_000).to_bytes(8, "little"))
    os.truncate(tmp_path / name, 300_000_000)
    read = Directory.read

    def short_read(self: Directory, file: str, start: int, stop: int) -> bytes:
        assert stop - start <= 8
        return read(self, file, start, stop)

    monkeypatch.setattr(Directory, "read", short_read)
    assert refusal(tmp_path).reason is Reason.CHECKPOINT_CORRUPT


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / FILE)
    whole = (tmp_path / FILE).read_bytes()
    for size in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:size])
        assert refusal(tmp_path).reason is Reason.CHECKPOINT_CORRUPT


def test_the_index_decides_which_files_belong(tmp_path: Path) -> None:
    """Stray files stay out, even one that holds a tensor of the same name or is damaged."""
    save_file({"a": MIXED["a"], "b": MIXED["c.weight"]}, tmp_path / "model-1.safetensors")
    save_file({"b": MIXED["b"]}, tmp_path / "model-2.safetensors")
    save_file({"a": MIXED["b"], "z": MIXED["b"]}, tmp_path / "consolidated.safetensors")
    (tmp_path / "adapter.safetensors").write_bytes(b"?")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    found = headers(tmp_path)
    assert found.keys() == {"a", "b"}
    assert (found["a"].file, found["a"].shape) == ("model-1.safetensors", (4, 1))
    assert (found["b"].file, found["b"].shape) == ("model-2.safetensors", (2, 3))


def test_a_tensor_in_two_files_is_that_of_the_index(tmp_path: Path) -> None:
    save_file({"a": MIXED["a"]}, tmp_path / "1.safetensors")
    save_file({"a": MIXED["b"], "b": MIXED["b"]}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert headers(tmp_path)["a"].shape == (4, 1)


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"a": FILE, "b": "gone.safetensors"}, "gone.safetensors"),
        ({"a": FILE, "lost": FILE}, "lost"),
        ({"a": FILE, "b": "2.safetensors"}, "b"),
        ({"a": "../model.safetensors"}, "../model.safetensors"),
        ({"a": 5}, INDEX),
        (["a"], INDEX),
        (None, INDEX),
    ],
    ids=str,
)
def test_an_index_that_misleads_is_refused(
    weight_map: Mapping[str, object] | None, named: str, tmp_path: Path
) -> None:
    save_file({"a": MIXED["a"], "b": MIXED["b"]}, tmp_path / FILE)
    save_file({"c": MIXED["a"]}, tmp_path / "2.safetensors")
    write_index(tmp_path, weight_map)
    error = refusal(tmp_path)
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert named in error.message


EIGHT = [f"model-{i}.safetensors" for i in range(8)]


def write_eight(folder: Path) -> None:
    for name in EIGHT:
        save_file({name: MIXED["a"]}, folder / name)
    write_index(folder, {name: name for name in EIGHT})


def test_the_headers_of_eight_files_are_asked_for_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a hub each is a few round trips."""
    write_eight(tmp_path)
    all_asked, read = threading.Barrier(8), Directory.read

    def slow_read(self: Directory, file: str, start: int, stop: int) -> bytes:
        if file in EIGHT and start == 0:
            all_asked.wait(10)
        return read(self, file, start, stop)

    monkeypatch.setattr(Directory, "read", slow_read)
    assert list(headers(tmp_path)) == EIGHT


def test_of_several_damaged_files_the_first_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it is the last to be read."""
    write_eight(tmp_path)
    for damaged in (EIGHT[2], EIGHT[5]):
        write(tmp_path, b"{", b"", damaged)
    later_read, read = threading.Event(), Directory.read

    def slow_read(self: Directory, file: str, start: int, stop: int) -> bytes:
        if file == EIGHT[2]:
            assert later_read.wait(10)
        content = read(self, file, start, stop)
        if file == EIGHT[5] and start > 0:
            later_read.set()
        return content

    monkeypatch.setattr(Directory, "read", slow_read)
    assert EIGHT[2] in refusal(tmp_path).message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 200_000], ids=range(6))
def test_json_that_is_no_object_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_json(opened(tmp_path), "config.json")
    assert caught.value.reason is Reason.CHECKPOINT_CORRUPT
    assert "config.json" in caught.value.message


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([], "no safetensors file"),
        (["a.safetensors", "b.safetensors"], "a.safetensors, b.safetensors"),
        (["pytorch_model.bin"], "no safetensors file"),
    ],
    ids=str,
)
def test_without_an_index_one_file_is_wanted(names: list[str], wanted: str, tmp_path: Path) -> None:
    for name in names:
        save_file({"a": MIXED["a"]}, tmp_path / name)
    error = refusal(tmp_path)
    assert error.reason is Reason.CHECKPOINT_NOT_FOUND
    assert wanted in error.message
    assert INDEX in error.message


@pytest.mark.parametrize("name", [FILE, "weights.safetensors"])
def test_without_an_index_the_one_file_is_read(name: str, tmp_path: Path) -> None:
    save_file({"a": MIXED["a"]}, tmp_path / name)
    if name == FILE:
        save_file({"z": MIXED["a"]}, tmp_path / "consolidated.safetensors")
    assert headers(tmp_path).keys() == {"a"}


class InMemory(Directory):
    """A repository of one file that is only bytes."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        return self.content[start:stop]  # type: ignore[attr-defined,no-any-return]


def read_bytes(content: bytes) -> dict[str, StoredTensor]:
    repository = InMemory(Path(), "fuzz", {FILE: len(content)}, "")
    object.__setattr__(repository, "content", content)
    return read_headers(repository)


LEAVES = st.none() | st.booleans() | st.integers(-2, 9) | st.integers() | st.floats() | st.text()
VALUES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=3), LEAVES)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I8"]) | VALUES,
        "shape": st.lists(st.integers(0, 3), max_size=2) | VALUES,
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | VALUES,
    },
)
HEADERS = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | VALUES)


@settings(max_examples=300, deadline=None)
@given(
    content=st.binary(max_size=64)
    | st.builds(
        lambda header, data: len(header).to_bytes(8, "little") + header + data,
        st.binary(max_size=32) | st.builds(lambda h: json.dumps(h).encode(), HEADERS | VALUES),
        st.binary(max_size=16),
    )
)
def test_any_bytes_are_tensors_or_a_refusal(content: bytes) -> None:
    try:
        found = read_bytes(content)
    except ModelError as error:
        if error.reason is not Reason.CHECKPOINT_CORRUPT:
            raise
    else:
        assert all(type(size) is int for tensor in found.values() for size in tensor.shape)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_changed_byte_never_does_worse_than_a_refusal(data: st.DataObject) -> None:
    whole = bytearray((GOLDEN / "llama3" / FILE).read_bytes()[:4000])
    whole[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    with pytest.raises(ModelError):  # cut at 4000 bytes, whatever was changed
        read_bytes(bytes(whole))
