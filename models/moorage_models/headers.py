"""What a Hugging Face checkpoint holds, from its index and its safetensors headers alone."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from moorage_models.dtypes import ITEM_BYTES
from moorage_models.errors import ModelError, Reason
from moorage_models.sources.source import Repository

INDEX = "model.safetensors.index.json"

#: Stored dtypes and their numpy names; any other means a quantised checkpoint.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_MAX_HEADER_BYTES = 32 << 20  # of all files; those of 480B parameters in 30000 tensors take 4 MB
_MAX_JSON_BYTES = 32 << 20
_MAX_VALUES = 1 << 20  # in one JSON text: a list of two bytes takes 64 in memory
_MAX_AXES = 32
_MAX_SIZE = 1 << 63
_READ_THREADS = 8  # files at a time: each takes a hub two to four round trips


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: Its name in the file.
        file: The file that holds it.
        dtype: numpy name of its dtype.
        shape: Its shape.
        offset: Where in the file its bytes begin.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_json(repository: Repository, name: str) -> dict[str, Any]:
    """A small JSON file of a checkpoint.

    Raises:
        ModelError: CHECKPOINT_CORRUPT if it is too long, or not a JSON object without doubt.
    """
    size = repository.files[name]
    if size > _MAX_JSON_BYTES:
        raise _corrupt(f"{name} has {size} bytes, too many for a JSON file")
    try:
        value = _parse(repository.read(name, 0, size))
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise _corrupt(f"{name} holds no JSON object")
    return value


def read_headers(repository: Repository) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint, by name.

    With an index, the index decides which files belong to it. Without one, `model.safetensors`
    does, or the only safetensors file there is.

    Raises:
        ModelError: CHECKPOINT_NOT_FOUND without safetensors files; CHECKPOINT_CORRUPT if a file is
            missing, cut short or malformed; CHECKPOINT_UNSUPPORTED for dtypes that are not plain.
    """
    if INDEX in repository.files:
        return _read_indexed(repository)
    candidates = [n for n in repository.files if n.endswith(".safetensors") and "/" not in n]
    if "model.safetensors" in candidates:
        candidates = ["model.safetensors"]
    if len(candidates) != 1:
        found = ", ".join(sorted(candidates)) or "no safetensors file"
        raise ModelError(
            Reason.CHECKPOINT_NOT_FOUND,
            f"{repository.label} holds {found}; wanted {INDEX} or model.safetensors",
        )
    tensors = _read_file(repository, _Allowance(_MAX_HEADER_BYTES), candidates[0])
    return {tensor.name: tensor for tensor in tensors}


def _read_indexed(repository: Repository) -> dict[str, StoredTensor]:
    weight_map = read_json(repository, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise _corrupt(f"{INDEX} has no weight_map from tensors to files")
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if name not in repository.files]:
        raise _corrupt(f"{INDEX} names files that are not there: {', '.join(missing)}")
    with ThreadPoolExecutor(_READ_THREADS, "headers") as pool:
        held = pool.map(partial(_read_file, repository, _Allowance(_MAX_HEADER_BYTES)), files)
        stored = {(t.file, t.name): t for tensors in held for t in tensors}
    if lost := [name for name, file in weight_map.items() if (file, name) not in stored]:
        raise _corrupt(f"{INDEX} places tensors in files that lack them: {', '.join(lost[:5])}")
    return {name: stored[file, name] for name, file in weight_map.items()}


class _Allowance:
    """The bytes that headers which are read side by side may have together."""

    def __init__(self, nbytes: int) -> None:
        self._left, self._lock = nbytes, threading.Lock()

    def takes(self, nbytes: int) -> bool:
        with self._lock:
            self._left -= nbytes
            return self._left >= 0


def _read_file(repository: Repository, allowance: _Allowance, name: str) -> list[StoredTensor]:
    """The header of one file: eight bytes of length, JSON, then the data without gaps."""
    size = repository.files[name]
    length = int.from_bytes(repository.read(name, 0, 8), "little") if size >= 8 else size
    start = 8 + length
    if start > size:
        raise _corrupt(f"{name} has {size} bytes but states a header of {length}")
    if not allowance.takes(length):
        raise _corrupt(f"{name} brings the headers to more than {_MAX_HEADER_BYTES} bytes")
    try:
        header = _parse(repository.read(name, 8, start))
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        spans = {key: _span(key, entry) for key, entry in entries.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise _corrupt(f"{name} has a malformed header: {error}") from error
    end = 0
    for key, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise _corrupt(f"{name} has a gap or an overlap before tensor {key}")
        end = stop
    if start + end != size:
        raise _corrupt(f"{name} has {size} bytes where its header states {start + end}")
    return [_tensor(key, name, entry, start + spans[key][0]) for key, entry in entries.items()]


def _span(key: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    begin, stop = _sizes(key, entry["data_offsets"])
    shape, dtype = _sizes(key, entry["shape"]), DTYPES.get(entry["dtype"])
    if stop < begin or not isinstance(entry["dtype"], str):
        raise ValueError(f"tensor {key} has a negative size or no dtype")
    if dtype and stop - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"tensor {key} has {stop - begin} bytes, not those of its shape")
    return begin, stop


def _sizes(key: str, values: object) -> list[int]:
    if not isinstance(values, list) or len(values) > _MAX_AXES or not all(map(_is_size, values)):
        raise ValueError(f"tensor {key} has {values!r:.40} in place of sizes")
    return values


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE


def _tensor(key: str, file: str, entry: Mapping[str, Any], offset: int) -> StoredTensor:
    # A dtype that is not plain is kept as it is: only a tensor that the plan needs is refused.
    dtype = DTYPES.get(entry["dtype"], str(entry["dtype"]))
    return StoredTensor(key, file, dtype, tuple(entry["shape"]), offset)


def _parse(content: bytes) -> Any:
    """A JSON text, in memory that its length bounds, in which no name is given twice.

    Raises:
        ValueError: It is no such text.
        RecursionError: It is nested too deeply.
    """
    if sum(map(content.count, (b"[", b"{", b","))) > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES} values")
    return json.loads(content.decode(), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.80} is there twice")
        found[name] = value
    return found


def _corrupt(message: str) -> ModelError:
    return ModelError(Reason.CHECKPOINT_CORRUPT, message)
