"""Ragged rows to padded batches and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from moorage_models.config import ModelConfig
from moorage_server.engine import Batch, Bucket
from moorage_server.engine.outputs import OUTPUTS, served
from moorage_server.errors import Reason, ServerError

#: The largest answer, in bytes.
MAX_OUTPUT_BYTES = 1 << 30

#: Runs one batch: see `Engine.forward`.
Forward = Callable[[Batch, Sequence[str]], Mapping[str, np.ndarray]]


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

    @property
    def starts(self) -> list[int]:
        """Where each row begins."""
        return [0, *itertools.accumulate(self.lengths)][:-1]


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
    for row, start in enumerate(rows.starts if segments else ()):
        _check_segments(row, rows.segments[start : start + rows.lengths[row]])
    return rows


def _check_segments(row: int, segments: np.ndarray) -> None:
    steps = np.diff(segments, prepend=0)
    if segments[0] != 1 or ((steps != 0) & (steps != 1)).any():
        raise ServerError(
            Reason.INVALID_REQUEST,
            f"the segments of row {row} are not numbered 1, 2, ... without a gap",
            row=str(row),
        )


def check_rows(
    rows: Rows, config: ModelConfig, outputs: Sequence[str], buckets: Sequence[Bucket]
) -> None:
    """Refuses what cannot be computed, before any work.

    Raises:
        ServerError: TOKEN_OUT_OF_RANGE, SEQUENCE_TOO_LONG, OUTPUT_NOT_SERVED or
            OUTPUT_TOO_LARGE.
    """
    bad = np.flatnonzero((rows.tokens < 0) | (rows.tokens >= config.vocab_size))
    if bad.size:
        row = int(np.searchsorted(rows.starts, bad[0], side="right")) - 1
        at = int(bad[0]) - rows.starts[row]
        raise ServerError(
            Reason.TOKEN_OUT_OF_RANGE,
            f"row {row} has token id {rows.tokens[bad[0]]} at position {at}; "
            f"the vocabulary has ids 0 to {config.vocab_size - 1}",
            row=str(row),
            position=str(at),
        )
    longest = buckets[-1].length
    for row, length in enumerate(rows.lengths):
        if length > longest:
            raise ServerError(
                Reason.SEQUENCE_TOO_LONG,
                f"row {row} has {length} tokens; the longest bucket has {longest}",
                row=str(row),
                limit=str(longest),
            )
    known = served(config)
    if unknown := [name for name in outputs if name not in known]:
        raise ServerError(
            Reason.OUTPUT_NOT_SERVED,
            f"this model does not serve {', '.join(unknown)}; it serves {', '.join(known)}",
        )
    size = sum(4 * len(rows.tokens) * math.prod(OUTPUTS[o].width(config)) for o in outputs)
    if size > MAX_OUTPUT_BYTES:
        raise ServerError(
            Reason.OUTPUT_TOO_LARGE,
            f"the answer would have {size} bytes; the limit is {MAX_OUTPUT_BYTES}: send fewer rows",
            limit=str(MAX_OUTPUT_BYTES),
        )


def score(
    rows: Rows,
    config: ModelConfig,
    outputs: Sequence[str],
    buckets: Sequence[Bucket],
    forward: Forward,
) -> dict[str, np.ndarray]:
    """Every output for every token of the rows.

    Args:
        rows: The rows, checked.
        config: The model's configuration.
        outputs: Names from the table of outputs.
        buckets: The compiled shapes.
        forward: Runs one batch.

    Returns:
        For each output `[tokens, ...]` in float32, packed as the rows are.

    Raises:
        ServerError: NON_FINITE_OUTPUT with the rows.
    """
    results = {
        name: np.empty((len(rows.tokens), *OUTPUTS[name].width(config)), np.float32)
        for name in outputs
    }
    for members, bucket in plan_batches(rows.lengths, buckets):
        values = forward(_pad(rows, members, bucket), outputs)
        start = 0
        for row in members:
            stop = start + rows.lengths[row]
            into = slice(rows.starts[row], rows.starts[row] + rows.lengths[row])
            for name in outputs:
                _report(results[name][into], values[name][start:stop], name, rows, into, row)
            start = stop
    return results


def plan_batches(
    lengths: Sequence[int], buckets: Sequence[Bucket]
) -> Iterator[tuple[list[int], Bucket]]:
    """Groups rows of one bucket length, longest first; as many as the bucket has rows at most."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        fitting = next(bucket.length for bucket in buckets if bucket.length >= length)
        by_length.setdefault(fitting, []).append(row)
    for fitting, members in sorted(by_length.items(), reverse=True):
        sizes = [bucket for bucket in buckets if bucket.length == fitting]
        while members:
            bucket = next((b for b in sizes if b.rows >= len(members)), sizes[-1])
            yield members[: bucket.rows], bucket
            members = members[bucket.rows :]


def _pad(rows: Rows, members: Sequence[int], bucket: Bucket) -> Batch:
    tokens, segments, positions = np.zeros((3, bucket.rows, bucket.length), np.int32)
    for i, row in enumerate(members):
        start, length = rows.starts[row], rows.lengths[row]
        own = rows.segments[start : start + length]
        tokens[i, :length] = rows.tokens[start : start + length]
        segments[i, :length] = own
        index = np.arange(length)
        positions[i, :length] = index - np.maximum.accumulate(np.where(_firsts(own), index, 0))
    return Batch(tokens, segments, positions, tuple(rows.lengths[row] for row in members))


def _firsts(segments: np.ndarray) -> np.ndarray:
    """Where a segment begins, within one row."""
    firsts: np.ndarray = np.diff(segments, prepend=0) != 0
    return firsts


def _report(
    into: np.ndarray, values: np.ndarray, name: str, rows: Rows, span: slice, row: int
) -> None:
    """Copies one row's values to the tokens that they are about."""
    if OUTPUTS[name].about_next:
        into[1:] = values[:-1]
        known = ~_firsts(rows.segments[span])
        into[~known] = np.nan
    else:
        into[...] = values
        known = np.ones(len(into), bool)
    if not np.isfinite(into[known]).all():
        raise ServerError(
            Reason.NON_FINITE_OUTPUT,
            f"{name} of row {row} is not finite: the model overflows in this compute dtype or its "
            "weights are damaged; load it with compute_dtype float32 to tell",
            row=str(row),
        )
