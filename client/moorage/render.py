"""Text for people and JSON for programs, out of the client's dataclasses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

import numpy as np

_NARROWEST = 8
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
_TIMES = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def table(
    columns: Mapping[str, Sequence[object]], width: int = 0, elastic: Sequence[str] = ()
) -> str:
    """Aligns columns; numbers to the right.

    Args:
        columns: The values of each column, by title.
        width: How wide the table may be, in characters; 0 for any width.
        elastic: Columns that lose their beginnings where the table is too wide.

    Returns:
        One line of titles, and one line for each row.
    """
    return "\n".join("  ".join(row).rstrip() for row in cells(columns, width, elastic))


def cells(
    columns: Mapping[str, Sequence[object]], width: int = 0, elastic: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """Gives the aligned cells of `table`: a row of titles, and all other rows."""
    aligned = {title: _aligned([title, *values]) for title, values in columns.items()}
    while 0 < width < _width(aligned):
        widest = max(elastic, key=lambda title: len(aligned[title][0]))
        if (left := len(aligned[widest][0]) - 1) < _NARROWEST:
            break
        aligned[widest] = _aligned([_end(str(v), left) for v in (widest, *columns[widest])])
    return list(zip(*aligned.values(), strict=True))


def pairs(facts: Mapping[str, object]) -> str:
    """Aligns names and values; leaves out what is empty or None."""
    known = {name: value for name, value in facts.items() if value not in ("", None)}
    width = max(map(len, known), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in known.items())


def size(count: int) -> str:
    """Writes bytes: 512 B, 1.5 KiB, 3.2 GiB."""
    unit = min(max(count.bit_length() - 1, 0) // 10, 4)
    value = count / (1 << 10 * unit)
    return f"{value:.1f} {'KMGT'[unit - 1]}iB" if unit else f"{count} B"


def sizes(part: int, whole: int) -> str:
    """Writes a part and the whole in the unit of the whole: 3.6/28.6 GiB, or 3.6 GiB for both."""
    text = size(whole)
    number, unit = text.split()
    return text if part == whole else f"{part / whole * float(number):.1f}/{number} {unit}"


def count(number: int) -> str:
    """Writes a count in at most six characters: 9999, 12.3k, 4.0M."""
    if number < 10_000:
        return str(number)
    unit = min((len(str(number)) - 1) // 3, 4)
    return f"{number / 1000**unit:.1f}{'kMGT'[unit - 1]}"


def duration(seconds: float, units: int = 2) -> str:
    """Writes a duration in its largest units, by default two: 0.5 s, 42 s, 2 min 5 s, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for unit, length in _TIMES:
        count, left = divmod(left, length)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:units] if count)


def line(text: object) -> str:
    """Writes a text that others chose so that a terminal obeys none of it: without controls."""
    return str(text).translate(_CONTROLS)


def document(value: object) -> str:
    """Writes one JSON document.

    Args:
        value: Dataclasses, arrays, times and plain values, nested at will.

    Returns:
        JSON; what is not a finite number is null, a time is ISO 8601.
    """
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)


def _aligned(values: Sequence[object]) -> list[str]:
    texts = [f"{value:.4f}" if isinstance(value, float) else line(value) for value in values]
    width = max(map(len, texts))
    right = any(isinstance(value, int | float) for value in values)
    return [f"{text:>{width}}" if right else f"{text:{width}}" for text in texts]


def _width(aligned: Mapping[str, Sequence[str]]) -> int:
    return sum(len(texts[0]) + 2 for texts in aligned.values()) - 2


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case datetime():
            return value.isoformat()
        case np.ndarray():
            return _plain(value.tolist())
        case list() | tuple():
            return [_plain(item) for item in value]
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case _ if is_dataclass(value):  # what repr leaves out (a model's client) is no data
            return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.repr}
        case _:
            return value
