"""Scores as text: a line for each position, and what does not run over positions below it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from moorage.render import table
from moorage.scores import Scores

WIDEST = 32
"""Values of one position that are printed; more go into --json only."""


def text(
    rows: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[str]] | None,
    scores: Scores,
    from_position: int = 0,
) -> str:
    """Writes scores.

    Args:
        rows: The rows of token ids.
        tokens: The tokens as text, or None.
        scores: Their scores.
        from_position: The first position of each row that was wanted.

    Returns:
        The lines.
    """
    places = [(r, p) for r, ids in enumerate(rows) for p in range(from_position, len(ids))]
    columns: dict[str, Sequence[object]] = {
        "ROW": [row for row, _ in places],
        "POSITION": [place for _, place in places],
    }
    if tokens is not None:  # quoted, as a token may be a space or a line break
        columns["TOKEN"] = [json.dumps(tokens[r][p], ensure_ascii=False) for r, p in places]
    columns["ID"] = [rows[row][place] for row, place in places]
    lengths = [max(len(ids) - from_position, 0) for ids in rows]
    blocks = []
    for name, arrays in scores.tensors.items():
        if not _is_narrow(arrays):
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            blocks.append(f"{name}: {arrays[0].dtype} {shapes}; --json prints it")
        elif [len(array) for array in arrays] == lengths:
            columns[name.upper()] = list(_cells(arrays))
        else:
            blocks.append(_own_table(name, arrays))
    along = len(columns) > 3 + (tokens is not None)
    return "\n\n".join([table(columns)] * along + blocks)


def _is_narrow(arrays: Sequence[NDArray[Any]]) -> bool:
    return arrays[0].ndim == 1 or (arrays[0].ndim == 2 and arrays[0].shape[1] <= WIDEST)


def _own_table(name: str, arrays: Sequence[NDArray[Any]]) -> str:
    columns: Mapping[str, Sequence[object]] = {
        "ROW": [row for row, array in enumerate(arrays) for _ in array],
        name.upper(): list(_cells(arrays)),
    }
    return table(columns)


def _cells(arrays: Sequence[NDArray[Any]]) -> Iterator[object]:
    for array in arrays:
        for value in array.tolist():
            yield " ".join(map(_written, value)) if isinstance(value, list) else value


def _written(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
