"""A forward pass as requests of the wire: one, or several where the rows do not fit into one."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moorage.enums import number_of
from moorage.errors import Error, InvalidRequest
from moorage.options import FirstToken, LogitScale
from moorage.packing import Row, groups, pack
from moorage.rows import Rows, integers
from moorage.transport import seconds_of
from moorage.v1 import moorage_pb2 as pb

_FIXED_BYTES = 128
"""What a request takes beside its rows and its outputs."""


@dataclass(frozen=True)
class Part:
    """The rows of a forward pass that one request is for.

    Attributes:
        template: What all requests of the pass have in common.
        rows: The rows.
    """

    template: pb.ForwardRequest
    rows: Sequence[Row]

    def request(self) -> pb.ForwardRequest:
        """Asks for the rows, under a fresh id."""
        return _request(self.template, self.rows)

    def halves(self, refusal: Error) -> tuple[Part, Part]:
        """Cuts the rows in two, if the answer for all of them is too large.

        How large it may be, and would be, is the server's to say: a handle tells neither the
        vocabulary nor the width of its model.

        Args:
            refusal: Why the request was refused.

        Returns:
            The first half, and the rest.

        Raises:
            Error: `refusal` itself, if it says something else or there is one row only.
        """
        if refusal.reason != "OUTPUT_TOO_LARGE" or len(self.rows) == 1:
            raise refusal
        middle = len(self.rows) // 2
        return Part(self.template, self.rows[:middle]), Part(self.template, self.rows[middle:])


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        parts: What is asked; the rows of one follow those of the one before.
        deadline: When all of it is given up, on the clock of `time.monotonic`.
    """

    parts: Sequence[Part]
    deadline: float


def make(  # noqa: D417 (the options are told of in one place)
    handle: str,
    rows: Rows,
    outputs: Iterable[str],
    segment_ids: Rows | None,
    *,
    top_k: int = 0,
    candidates: Rows | None = None,
    layer: int | None = None,
    positions: Rows | None = None,
    temperature: float = 1.0,
    logit_scale: LogitScale = "raw",
    first_token: FirstToken = "nan",
    from_position: int | Rows = 0,
    expected_weights_version: int | None = None,
    timeout: float | None = None,
) -> Batch:
    """Asks for a forward pass; `ForwardOptions` says what the options are.

    Args:
        handle: The model's handle.
        rows: Ragged rows of token ids.
        outputs: Names of outputs; whether they are served is the server's to say.
        segment_ids: Shaped as `rows`, or None: each row is one segment.

    Returns:
        The pass, in requests as `groups` cuts them. It holds copies of what is given,
        and its time has begun.

    Raises:
        InvalidRequest: A value is of the wrong kind or shape, or contradicts another.
        MessageTooLarge: One row alone is too large for a request.
    """
    seconds = seconds_of(timeout)
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    flat, sets = _candidates(candidates)
    packed = pack(rows, from_position, segment_ids, positions, sets)
    semantics = pb.Semantics(
        first_token=number_of(pb.FirstToken, "first_token", first_token),
        logit_scale=number_of(pb.LogitScale, "logit_scale", logit_scale),
    )
    try:
        semantics.temperature = temperature
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        names += ["top_k"] * bool(top_k) + ["candidates"] * (candidates is not None)
        template = pb.ForwardRequest(
            handle=handle,
            outputs=pb.OutputSpec(
                names=dict.fromkeys(names),
                top_k=top_k,
                candidates=flat,
                layer=layer,
            ),
            semantics=semantics,
            expected_weights_version=expected_weights_version,
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"an argument of forward() is of the wrong kind: {error}") from error
    if not 0 < semantics.temperature < math.inf:
        raise InvalidRequest(f"temperature is {temperature}; give a float32 above 0")
    cut = groups(packed, template.ByteSize() + _FIXED_BYTES)
    return Batch([Part(template, part) for part in cut], deadline)


def _candidates(candidates: Any) -> tuple[pb.Candidates | None, Rows | None]:
    """Tells one list for all positions from tables by position."""
    if candidates is None:
        return None, None
    try:
        array = hasattr(candidates, "__array__")
        items = np.asarray(candidates) if array else list(candidates)
    except TypeError as error:
        raise InvalidRequest(f"candidates must be a list of token ids: {error}") from error
    if len(items) > 0 and hasattr(items[0], "__len__"):
        return None, items
    return pb.Candidates(ids=integers(items, "candidates").tolist()), None


def _request(template: pb.ForwardRequest, rows: Sequence[Row]) -> pb.ForwardRequest:
    request = pb.ForwardRequest(request_id=uuid.uuid4().hex)
    request.MergeFrom(template)
    lengths = [row.tokens.size for row in rows]
    begins = np.cumsum([0, *lengths[:-1]])
    request.row_lengths.extend(lengths)
    request.token_ids.extend(_joined([row.tokens for row in rows]))
    request.segment_ids.extend(_joined([row.segments for row in rows]))
    positions = [
        None if row.positions is None else row.positions + begin
        for row, begin in zip(rows, begins, strict=True)
    ]
    request.outputs.positions.extend(_joined(positions))
    if any(row.start for row in rows):
        request.from_positions.extend(row.start for row in rows)
    if sets := [row.sets for row in rows if row.sets is not None]:
        candidates = request.outputs.candidates
        candidates.ids_by_position = np.concatenate(sets).astype("<i4", copy=False).tobytes()
        candidates.count = sets[0].shape[1]
    return request


def _joined(arrays: Sequence[NDArray[Any] | None]) -> list[int]:
    known = [array for array in arrays if array is not None]
    return list(np.concatenate(known).tolist()) if known else []
