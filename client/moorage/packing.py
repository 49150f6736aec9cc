"""Rows as they are sent, and which of them go into one request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass

import numpy as np

from moorage.errors import InvalidRequest, MessageTooLarge
from moorage.rows import Integers, Rows, integers, ragged

MAX_TOKENS = 128 << 10
"""Tokens of one request; a longer row goes alone."""

ROW_TOKENS = 128
"""What a row counts as at the least: servers pad rows to that or more, and bound what waits so."""

MAX_BYTES = 3 << 20
"""Bytes of one request; servers take 4 MiB."""

_TOKEN_BYTES = 20
"""What a token takes at the most: its id, its segment and its position, as varints."""

_ROW_BYTES = 16
"""What a row takes beside its tokens."""


@dataclass(frozen=True)
class Row:
    """One row as it is sent.

    Attributes:
        tokens: [length]: its token ids.
        start: The first position that is wanted.
        segments: [length], or None for one segment.
        positions: Those of "hidden" and "score", counted from the row's beginning, or None.
        sets: [wanted, candidates]: the candidates by position, or None.
    """

    tokens: Integers
    start: int
    segments: Integers | None
    positions: Integers | None
    sets: Integers | None

    @property
    def wanted(self) -> int:
        """How many positions are wanted."""
        return max(self.tokens.size - self.start, 0)

    @property
    def counted(self) -> int:
        """How many tokens it is of `MAX_TOKENS`."""
        return max(self.tokens.size, ROW_TOKENS)

    @property
    def size(self) -> int:
        """Bytes of a message that it takes at the most."""
        sets = 0 if self.sets is None else self.sets.nbytes
        return _ROW_BYTES + _TOKEN_BYTES * self.tokens.size + sets


def pack(
    rows: Rows,
    from_position: int | Rows,
    segment_ids: Rows | None,
    positions: Rows | None,
    sets: Rows | None,
) -> list[Row]:
    """Reads the rows, and all that is given for each of them.

    Args:
        rows: Ragged rows of token ids.
        from_position: The first position that is wanted, one or one for each row.
        segment_ids: Shaped as the rows, or None.
        positions: Ragged positions, or None; negative ones count from the row's end.
        sets: The candidates by position, one table for each row, or None.

    Returns:
        The rows.

    Raises:
        InvalidRequest: They are no rows of 32-bit integers, or do not fit each other.
    """
    tokens = ragged(rows, "rows")
    count = len(tokens)
    columns = zip(
        tokens,
        _starts(from_position, count),
        _column("segment_ids", segment_ids, count),
        _column("positions", positions, count),
        _column("candidates", sets, count, axes=2),
        strict=True,
    )
    made = [_row(index, *parts) for index, parts in enumerate(columns)]
    sizes = {row.sets.shape[1] for row in made if row.sets is not None}
    if len(sizes) > 1:
        raise InvalidRequest(f"candidates has lines of {sorted(sizes)} tokens; give as many in all")
    return made


def _starts(from_position: int | Rows, count: int) -> list[int]:
    axes = int(isinstance(from_position, Sized))
    starts = integers(from_position, "from_position", axes)
    if axes and starts.size != count:
        raise InvalidRequest(f"from_position has {starts.size} values; there are {count} rows")
    if starts.min() < 0:
        raise InvalidRequest(f"from_position is {starts.min()}; positions count from 0")
    return list(np.broadcast_to(starts, count).tolist())


def _column(name: str, values: Rows | None, count: int, axes: int = 1) -> Sequence[Integers | None]:
    """One value for each row, or None for each."""
    if values is None:
        return [None] * count
    column = ragged(values, name, axes)
    if len(column) != count:
        raise InvalidRequest(f"{name} is for {len(column)} rows; there are {count}")
    return column


def _row(
    index: int,
    tokens: Integers,
    start: int,
    segments: Integers | None,
    positions: Integers | None,
    sets: Integers | None,
) -> Row:
    row = Row(tokens, start, segments, _indices(index, positions, tokens.size), sets)
    if segments is not None and segments.size != tokens.size:
        raise InvalidRequest("segment_ids and rows differ in shape; give one id for each token")
    if sets is not None and len(sets) != row.wanted:
        raise InvalidRequest(
            f"candidates[{index}] is for {len(sets)} positions; row {index} has {row.wanted} that "
            "are wanted"
        )
    return row


def _indices(index: int, positions: Integers | None, length: int) -> Integers | None:
    """Positions within a row, where negative ones count from its end, as they are sent."""
    if positions is None:
        return None
    found = np.where(positions < 0, positions + length, positions)
    if found.min() < 0 or found.max() >= length or (np.diff(found) <= 0).any():
        raise InvalidRequest(
            f"positions[{index}] is {positions.tolist()}; give rising ones among the {length} "
            f"tokens of row {index}"
        )
    return found


def groups(rows: Sequence[Row], fixed: int) -> Iterator[list[Row]]:
    """Puts rows together that fit into one request.

    Args:
        rows: The rows.
        fixed: Bytes that are in every request beside its rows.

    Yields:
        The rows of each request, in order.

    Raises:
        MessageTooLarge: One row alone does not fit.
    """
    group: list[Row] = []
    tokens, size = 0, fixed
    for index, row in enumerate(rows):
        if fixed + row.size > MAX_BYTES:
            raise _too_large(index, row, fixed)
        if group and (tokens + row.counted > MAX_TOKENS or size + row.size > MAX_BYTES):
            yield group
            group, tokens, size = [], 0, fixed
        group.append(row)
        tokens, size = tokens + row.counted, size + row.size
    yield group


def _too_large(index: int, row: Row, fixed: int) -> MessageTooLarge:
    length = row.tokens.size
    room = MAX_BYTES - fixed - _ROW_BYTES
    sets, fits = "", f"{max(room // _TOKEN_BYTES, 0)} tokens would"
    if row.sets is not None and row.wanted:
        sets = f" with {row.sets.shape[1]} candidates at each of {row.wanted} positions"
        most = max(room - _TOKEN_BYTES * length, 0) // (4 * row.wanted)
        fits = f"{most} at each would; or fewer positions, by from_position"
    return MessageTooLarge(
        f"row {index} of {length} tokens{sets} does not fit into a request of {MAX_BYTES} bytes; "
        f"{fits}"
    )
