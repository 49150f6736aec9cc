"""Batches of rows, from one request or many, and the values that come back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moorage_models.config import ModelConfig
from moorage_server.engine import Answers, Batch, Bucket, Question
from moorage_server.engine.outputs import Profile
from moorage_server.errors import Reason, ServerError
from moorage_server.requests import Part, Wanted, plan_parts
from moorage_server.rows import Rows

#: Runs one batch: see `Engine.forward`.
Forward = Callable[[Batch, Sequence[Question]], Answers]

_NAMED_ROWS = 20


@dataclass
class Timings:
    """Where the time of a request went, in seconds."""

    pad: float = 0.0
    execute: float = 0.0
    transfer: float = 0.0


class TensorShape(NamedTuple):
    """A tensor of an answer: its sizes and its dtype, which have four bytes an element."""

    sizes: tuple[int, ...]
    dtype: str

    def nbytes(self) -> int:
        """Its bytes."""
        return 4 * math.prod(self.sizes)

    def empty(self, first_value: float) -> np.ndarray:
        """One that says nothing yet: the value of first tokens, or of ids -1."""
        return np.full(self.sizes, first_value if self.dtype == "float32" else -1, self.dtype)


@dataclass
class Work:
    """A request on its way to its answer.

    Attributes:
        rows: The rows.
        wanted: What is wanted of them.
        parts: What is asked of each program of the head.
        shapes: Those of the tensors of the answer.
        row_lengths: How many entries of each tensor belong to each row.
        timings: Where the time went.
        buckets: The shapes that rows ran in.
        bad_rows: Rows with values that are not finite.
    """

    rows: Rows
    wanted: Wanted
    parts: Sequence[Part]
    shapes: dict[str, TensorShape]
    row_lengths: dict[str, Int[np.ndarray, " r"]]
    timings: Timings = field(default_factory=Timings)
    buckets: set[Bucket] = field(default_factory=set)
    bad_rows: set[int] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        """Bytes of the answer."""
        return sum(map(TensorShape.nbytes, self.shapes.values()))

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The answer so far: by name `[n, ...]`, packed as the entries of the parts are.

        Memory is taken when it is first asked for: a request that is refused has taken none.
        """
        return {name: shape.empty(self.wanted.first_value) for name, shape in self.shapes.items()}

    def runnable(self) -> list[int]:
        """The rows that must be run: something is wanted of them that can be said."""
        some = np.zeros(len(self.rows.lengths), bool)
        for part in self.parts:
            row = np.searchsorted(part.offsets, np.flatnonzero(part.after >= 0), side="right") - 1
            some[row] = True
        return np.flatnonzero(some).tolist()

    def put(self, part: Part, row: int, values: Mapping[str, np.ndarray]) -> None:
        """Takes the values of one row's entries, of those where something can be said."""
        entries = part.of(row)
        where = part.after[entries] >= 0
        for name in part.profile.tensors(part.names):
            into = self.tensors[name][entries]
            own = values[name][:, : into.shape[1]] if into.ndim > 1 else values[name]
            into[where] = own
            if not np.isfinite(own).all():
                self.bad_rows.add(row)

    def check(self) -> None:
        """Raises NON_FINITE_OUTPUT, with the rows, if some values are not finite."""
        if not self.bad_rows:
            return
        bad = sorted(self.bad_rows)
        named = ", ".join(map(str, bad[:_NAMED_ROWS])) + " and more" * (len(bad) > _NAMED_ROWS)
        raise ServerError(
            Reason.NON_FINITE_OUTPUT,
            f"outputs of {len(bad)} rows are not finite: {named}. The model overflows in this "
            "compute dtype or its weights are damaged; load it with compute_dtype float32 to tell",
            rows=named,
        )


def make_work(
    rows: Rows,
    wanted: Wanted,
    config: ModelConfig,
    buckets: Sequence[Bucket],
    profiles: Sequence[Profile],
) -> Work:
    """Checks a request.

    Raises:
        ServerError: See `plan_parts`.
    """
    parts = plan_parts(rows, wanted, config, buckets, profiles)
    shapes, lengths = {}, {}
    for part in parts:
        for name, tensor in part.profile.tensors(part.names).items():
            sizes = (len(part.after), *tensor.width(config, part.size))
            shapes[name] = TensorShape(sizes, tensor.dtype)
            lengths[name] = np.diff(part.offsets)
    return Work(rows, wanted, parts, shapes, lengths)


@dataclass(frozen=True)
class Piece:
    """One row of a request, which runs as a whole.

    Attributes:
        work: The request.
        row: Which of its rows.
    """

    work: Work
    row: int

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return self.work.rows.lengths[self.row]


@dataclass(frozen=True)
class _Entries:
    """What one part asks of one row, and its place in the question that it is asked in."""

    piece: Piece
    part: Part
    question: int
    span: slice


def run_batch(pieces: Sequence[Piece], bucket: Bucket, devices: int, forward: Forward) -> None:
    """Runs rows of any requests together, and gives the values to their requests.

    Args:
        pieces: At most as many as the bucket has rows; all of one `layer`.
        bucket: The shape to run in; no piece is longer.
        devices: Over how many devices the bucket's rows are split.
        forward: Runs the batch.
    """
    begin = time.perf_counter()
    places = [_place(i, bucket.rows, devices) for i in range(len(pieces))]
    batch = _pad(pieces, places, bucket)
    questions, entries = _questions(pieces, places, bucket)
    padded = time.perf_counter() - begin
    answers = forward(batch, questions)
    begin = time.perf_counter()
    for entry in entries:
        tensors = answers.tensors[entry.question]
        values = {name: tensor[entry.span] for name, tensor in tensors.items()}
        entry.piece.work.put(entry.part, entry.piece.row, values)
    padded += time.perf_counter() - begin
    for work in {id(piece.work): piece.work for piece in pieces}.values():
        work.buckets.add(bucket)
        work.timings.pad += padded
        work.timings.execute += answers.execute_seconds
        work.timings.transfer += answers.transfer_seconds


def score(work: Work, buckets: Sequence[Bucket], devices: int, forward: Forward) -> None:
    """Runs one request by itself, its longest rows first."""
    by_length: dict[int, list[Piece]] = {}
    for row in work.runnable():
        piece = Piece(work, row)
        by_length.setdefault(length_for(piece.length, buckets), []).append(piece)
    for length, pieces in sorted(by_length.items(), reverse=True):
        while pieces:
            bucket = bucket_for(len(pieces), length, buckets)
            run_batch(pieces[: bucket.rows], bucket, devices, forward)
            pieces = pieces[bucket.rows :]


def length_for(tokens: int, buckets: Sequence[Bucket]) -> int:
    """The length of the shortest bucket that holds a row."""
    return next(bucket.length for bucket in buckets if bucket.length >= tokens)


def bucket_for(rows: int, length: int, buckets: Sequence[Bucket]) -> Bucket:
    """The smallest bucket of a length that holds so many rows, or the largest there is."""
    sizes = [bucket for bucket in buckets if bucket.length == length]
    return next((bucket for bucket in sizes if bucket.rows >= rows), sizes[-1])


def _place(i: int, rows: int, devices: int) -> int:
    """The row of a batch that the `i`-th piece takes: one device after another."""
    return i % devices * (rows // devices) + i // devices


def _pad(pieces: Sequence[Piece], places: Sequence[int], bucket: Bucket) -> Batch:
    tokens, segments, positions = np.zeros((3, bucket.rows, bucket.length), np.int32)
    for piece, place in zip(pieces, places, strict=True):
        rows, start, length = piece.work.rows, piece.work.rows.starts[piece.row], piece.length
        span = slice(start, start + length)
        tokens[place, :length] = rows.tokens[span]
        segments[place, :length] = rows.segments[span]
        at = rows.at[span]
        positions[place, :length] = at - np.maximum.accumulate(np.where(rows.begins[span], at, 0))
    return Batch(tokens, segments, positions, pieces[0].work.wanted.layer)


def _questions(
    pieces: Sequence[Piece], places: Sequence[int], bucket: Bucket
) -> tuple[list[Question], list[_Entries]]:
    """One question for each program, and where in it each piece's entries are."""
    asked: dict[Profile, list[Question]] = {}
    entries: list[_Entries] = []
    for piece, place in zip(pieces, places, strict=True):
        for part in piece.work.parts:
            earlier = asked.setdefault(part.profile, [])
            start = sum(len(question.after) for question in earlier)
            earlier.append(_question(part, piece.row, place * bucket.length))
            span = slice(start, start + len(earlier[-1].after))
            entries.append(_Entries(piece, part, list(asked).index(part.profile), span))
    return [_joined(questions) for questions in asked.values()], entries


def _question(part: Part, row: int, start: int) -> Question:
    """What a part asks of a row that begins at some place of a batch."""
    own = part.of(row)
    known = np.flatnonzero(part.after[own] >= 0) + own.start
    candidates = np.zeros((len(known), part.profile.candidates), np.int32)
    sets = part.candidates[known] if len(part.candidates) > 1 else part.candidates
    candidates[:, : sets.shape[1]] = sets
    return Question(
        part.profile,
        part.after[known] + np.int32(start),
        part.targets[known],
        np.full(len(known), part.temperature, np.float32),
        candidates,
    )


def _joined(questions: Sequence[Question]) -> Question:
    """Several questions of one program as one."""
    return Question(
        questions[0].profile,
        np.concatenate([question.after for question in questions]),
        np.concatenate([question.targets for question in questions]),
        np.concatenate([question.temperatures for question in questions]),
        np.concatenate([question.candidates for question in questions]),
    )
