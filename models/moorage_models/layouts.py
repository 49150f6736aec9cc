"""Layouts other than Hugging Face's: how an Orbax tree holds the decoder's parameters.

A row says where one parameter is, and by a pattern of letters how its axes lie there and how they
become ours. The letters of a stored array are

    V vocabulary   D embed_dim   N num_heads   K num_kv_heads   H head_dim   F hidden_dim
    X experts      M expert_hidden_dim         S parts that are stored together
    Q query, key and value heads one after another             W gate and up one after another

`"N D H -> (N H) D"` is a query kernel of Flax: heads first, made into our `[out, in]`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moorage_models.config import ModelConfig
from moorage_models.dtypes import ITEM_BYTES


@dataclass(frozen=True)
class Row:
    """Where one parameter is in a tree.

    Attributes:
        key: The leaf's path; below the layer for stacked parameters. `@` is the layer's suffix.
        pattern: Its axes there, and ours.
        select: Which part of the axis `S`; None where there is no such axis.
        part: Which part of the axis `Q` or `W`, a key of `PARTS`; empty where there is none.
        fold: What was folded into the values, a key of `FOLDS`.
        interleaved: Rotary pairs lie side by side along `H`, not in two halves.
    """

    key: str
    pattern: str
    select: int | None = None
    part: str = ""
    fold: str = ""
    interleaved: bool = False

    @property
    def stored(self) -> list[str]:
        """The letters of the stored axes."""
        return self.pattern.split("->")[0].split()

    @property
    def wanted(self) -> list[list[str]]:
        """The letters of our axes; an axis may join several."""
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.pattern.split("->")[1])
        return [(joined or single).split() for joined, single in groups]


@dataclass(frozen=True)
class Place:
    """Where one layer may be.

    Attributes:
        base: The path of the layer's subtree.
        suffix: What stands for `@` in the rows' keys.
        index: Its place on the layer axis, which is axis 1 of every array; None without one.
    """

    base: str
    suffix: str = ""
    index: int | None = None

    def key(self, row: Row) -> str:
        """The path of a row's leaf in this layer."""
        return f"{self.base}/{row.key.replace('@', self.suffix)}"


@dataclass(frozen=True)
class Layout:
    """How one family's parameters lie in an Orbax tree.

    Attributes:
        name: For messages.
        rows: For each parameter, the rows to try in order.
        places: From a layer's number and the number of layers, where that layer may be.
    """

    name: str
    rows: Mapping[str, tuple[Row, ...]]
    places: Callable[[int, int], Iterable[Place]]


@dataclass(frozen=True)
class StoredArray:
    """One leaf of an Orbax tree.

    Attributes:
        path: Its keys, outermost first.
        dtype: numpy name of its dtype.
        shape: Its shape.
    """

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ArrayPiece:
    """A stored array, and which layers of a parameter it is.

    Attributes:
        tensor: The stored array.
        row: How its axes and values become ours.
        layers: The layers that it holds, in order, if it has a layer axis; the one layer that it
            is, if not; none for a parameter that is not stacked.
        scanned: It has a layer axis, axis 1.
    """

    tensor: StoredArray
    row: Row
    layers: tuple[int, ...] = ()
    scanned: bool = False


def stored_letters(row: Row, *, scanned: bool) -> list[str]:
    """The letters of a row's stored axes, the layer axis `L` included."""
    letters = row.stored
    return [letters[0], "L", *letters[1:]] if scanned else letters


def stored_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter; `S` is known only by the array."""
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.hidden_dim,
        "X": config.num_experts,
        "M": config.expert_hidden_dim,
        "Q": config.num_heads + 2 * config.num_kv_heads,
        "W": 2 * config.expert_hidden_dim,
    }


#: The axis that holds a part among others, and where the part begins and ends on it.
PARTS: Mapping[str, Callable[[ModelConfig], tuple[str, int, int]]] = {
    "query": lambda c: ("Q", 0, c.num_heads),
    "key": lambda c: ("Q", c.num_heads, c.num_heads + c.num_kv_heads),
    "value": lambda c: ("Q", c.num_heads + c.num_kv_heads, c.num_heads + 2 * c.num_kv_heads),
    "gate": lambda c: ("W", 0, c.expert_hidden_dim),
    "up": lambda c: ("W", c.expert_hidden_dim, 2 * c.expert_hidden_dim),
}


#: Undoes what a checkpoint's writer folded into the values. They are float32 here.
FOLDS: Mapping[str, Callable[[Any, ModelConfig], Any]] = {
    "query by head_dim": lambda x, config: x * np.float32(config.head_dim**0.5),
    "query by query_scale": lambda x, config: x / np.float32(config.query_scale),
    "embedding": lambda x, config: x / np.float32(config.embed_dim**0.5),
    "bfloat16 embedding": lambda x, config: x / rounded_root(config.embed_dim),
    "one plus": lambda x, config: x - np.float32(1),
}


def rounded_root(width: int) -> np.float32:
    """sqrt(width) rounded to bfloat16, to nearest even."""
    bits = int(np.float32(width**0.5).view(np.uint32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.float32(np.uint32(bits).view(np.float32))


def fill_template(template: str, index: tuple[int, ...]) -> str:
    """A tensor's name: `*` is the layer, `#` the expert."""
    for mark, number in zip("*#", index, strict=False):
        template = template.replace(mark, str(number))
    return template
