"""Integers that are to be sent: ragged rows, flat lists and tables, checked before they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moorage.errors import InvalidRequest

Rows: TypeAlias = Iterable[Any]
"""Ragged rows of integers: a list of lists or integer arrays, or one array [rows, length]."""

Integers: TypeAlias = NDArray[np.int32]

_KINDS = {"b": "bool", "f": "float", "i": "integer", "O": "mixed", "u": "integer", "U": "text"}
"""What is in an array, by the kind of its dtype."""

_SHAPES = ("an integer", "a flat row of integers", "a table of integers")


def ragged(rows: Rows, name: str, axes: int = 1) -> list[Integers]:
    """Reads one array for each row.

    Args:
        rows: Ragged rows of integers, or one array.
        name: What they are called in errors.
        axes: How many axes each row has.

    Returns:
        Copies of the rows, int32; none is empty, but that a table may have no lines.

    Raises:
        InvalidRequest: There is no row, or a row is empty or not of 32-bit integers.
    """
    try:
        table = np.asarray(rows) if hasattr(rows, "__array__") else rows
        arrays = [integers(row, f"{name}[{index}]", axes) for index, row in enumerate(table)]
    except TypeError as error:
        raise InvalidRequest(f"{name} must be a list of rows of integers: {error}") from error
    if not arrays:
        raise InvalidRequest(f"{name} holds no row; give at least one")
    return arrays


def integers(value: Any, name: str, axes: int = 1) -> Integers:
    """Reads 32-bit integers.

    Args:
        value: An array, or lists of numbers.
        name: What they are called in errors.
        axes: How many axes they have.

    Returns:
        A copy, int32; not empty, but that a table may have no lines.

    Raises:
        InvalidRequest: They are none, of another shape, no integers or too large.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{name}: {error}") from error
    if array.ndim == axes and array.shape[-1:] == (0,):
        raise InvalidRequest(f"{name} is empty; leave it out", reason="ROW_EMPTY")
    if array.ndim != axes or array.dtype.kind not in "iu":
        raise InvalidRequest(f"{name} must be {_SHAPES[axes]}, not {_kind(array)}")
    if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise InvalidRequest(
            f"{name} holds {array.min()} to {array.max()}; 32-bit integers are sent",
            reason="TOKEN_OUT_OF_RANGE",
        )
    return array.astype(np.int32)


def _kind(array: NDArray[Any]) -> str:
    """What somebody gave, in words."""
    kind = _KINDS.get(array.dtype.kind, str(array.dtype))
    return f"{kind} of shape {list(array.shape)}" if array.ndim else f"one {kind}"
