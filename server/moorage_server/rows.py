"""Ragged rows of token ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int, Int32

from moorage_server.errors import Reason, ServerError


@dataclass(frozen=True)
class Rows:
    """Ragged rows of token ids, packed one after another.

    Attributes:
        tokens: The ids of all rows.
        segments: The segment of each token within its row, from 1.
        lengths: Tokens of each row.
    """

    tokens: Int32[np.ndarray, " t"]
    segments: Int32[np.ndarray, " t"]
    lengths: tuple[int, ...]

    @cached_property
    def starts(self) -> list[int]:
        """Where each row begins."""
        return [0, *itertools.accumulate(self.lengths)][:-1]

    @cached_property
    def row(self) -> Int[np.ndarray, " t"]:
        """The row of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def at(self) -> Int[np.ndarray, " t"]:
        """The position of each token in its row."""
        at: np.ndarray = np.arange(len(self.row)) - np.array(self.starts)[self.row]
        return at

    @cached_property
    def begins(self) -> Bool[np.ndarray, " t"]:
        """Whether each token is the first of a segment."""
        begins: np.ndarray = (self.at == 0) | (np.diff(self.segments, prepend=0) != 0)
        return begins


def make_rows(tokens: Sequence[int], lengths: Sequence[int], segments: Sequence[int]) -> Rows:
    """Rows from the fields of a request; without segments every row is one.

    Raises:
        ServerError: INVALID_REQUEST if the lengths do not add up, or a row's segments are not
            contiguous and numbered from 1; ROW_EMPTY.
    """
    if not lengths:
        raise ServerError(Reason.ROW_EMPTY, "the request holds no row", row="0")
    for row, length in enumerate(lengths):
        if length < 1:
            raise ServerError(
                Reason.ROW_EMPTY, f"row {row} holds no token; leave it out", row=str(row)
            )
    if sum(lengths) != len(tokens) or len(segments) not in (0, len(tokens)):
        raise ServerError(
            Reason.INVALID_REQUEST,
            f"row_lengths add up to {sum(lengths)}; there are {len(tokens)} token ids and "
            f"{len(segments)} segment ids",
        )
    ids = np.array(tokens, np.int32)
    rows = Rows(ids, np.array(segments or np.ones_like(ids), np.int32), tuple(lengths))
    if segments:
        _check_segments(rows)
    return rows


def _check_segments(rows: Rows) -> None:
    steps = np.diff(rows.segments, prepend=0)
    wrong = np.where(rows.at == 0, rows.segments != 1, (steps != 0) & (steps != 1))
    if wrong.any():
        row = int(rows.row[wrong.argmax()])
        raise ServerError(
            Reason.INVALID_REQUEST,
            f"the segments of row {row} are not numbered 1, 2, ... without a gap",
            row=str(row),
        )


def check_rows(rows: Rows, vocabulary: int, longest: int) -> None:
    """Refuses rows that cannot be run.

    Args:
        rows: The rows.
        vocabulary: How many tokens there are.
        longest: The length of the longest bucket.

    Raises:
        ServerError: TOKEN_OUT_OF_RANGE or SEQUENCE_TOO_LONG.
    """
    bad = np.flatnonzero((rows.tokens < 0) | (rows.tokens >= vocabulary))
    if bad.size:
        row, at = int(rows.row[bad[0]]), int(rows.at[bad[0]])
        raise ServerError(
            Reason.TOKEN_OUT_OF_RANGE,
            f"row {row} has token id {rows.tokens[bad[0]]} at position {at}; "
            f"the vocabulary has ids 0 to {vocabulary - 1}",
            row=str(row),
            position=str(at),
        )
    for row, length in enumerate(rows.lengths):
        if length > longest:
            raise ServerError(
                Reason.SEQUENCE_TOO_LONG,
                f"row {row} has {length} tokens; the longest bucket has {longest}",
                row=str(row),
                limit=str(longest),
            )
