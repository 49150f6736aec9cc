"""What a forward pass gives: tensors by name, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moorage.errors import DataLoss, FailedPrecondition

Floats: TypeAlias = list[NDArray[np.float32]] | None
"""One array for each row; None if the output was not asked for."""


@dataclass(frozen=True)
class Semantics:
    """What the numbers mean.

    Attributes:
        temperature: The logits were divided by this before the softmax.
        head_dtype: The dtype of the head's product; softmax and log-sum-exp are float32 always.
        first_token: What stands at the first token of a segment: "nan" or "zero".
        logit_scale: What was done to "logits": "raw" for nothing, "scaled" for divided by the
            temperature.
        segments: What segments of a row mean to each other: "isolated".
    """

    temperature: float
    head_dtype: str
    first_token: str
    logit_scale: str
    segments: str


@dataclass(frozen=True)
class Times:
    """Where the time went, in seconds; of several requests the longest queue, and sums.

    Attributes:
        queue: From when the request was taken until its first row ran.
        pad: Putting rows together and apart.
        execute: The devices computed batches that held some of the rows.
        transfer: Bringing results from the devices.
    """

    queue: float
    pad: float
    execute: float
    transfer: float


@dataclass(frozen=True, eq=False)
class Scores:
    """The outputs of one forward pass, and what they come from.

    Every output is a list of arrays, one for each row, over its wanted positions: all, or those
    from `from_position` on. What is about token t given those before it stands at t; nothing
    precedes the first token of a segment, where NaN and the id -1 stand. The arrays of one output
    are views of as many buffers as there were requests.

    Attributes:
        tensors: Every tensor of the answer by its name: float32 or int32, [positions, ...].
        handle: The model that answered.
        model_id: Its id.
        revision: The resolved revision of its checkpoint.
        dtype: The dtype of its parameters.
        compute_dtype: The dtype of the arithmetic.
        weights_digest: A digest of the weights; its prefix says of what: "hub", "stat" or
            "content".
        weights_version: The version of the weights: 1 as they were loaded.
        mesh: Size of each axis of the server's mesh by name, outermost first.
        buckets: The compiled shapes (rows, length) that the rows ran in.
        server_version: The server's version.
        request_id: The request as the server's log names it; of several, all, with commas between.
        semantics: What the numbers mean.
        times: Where the time went.
    """

    tensors: Mapping[str, list[NDArray[Any]]]
    handle: str
    model_id: str
    revision: str
    dtype: str
    compute_dtype: str
    weights_digest: str
    weights_version: int
    mesh: Mapping[str, int]
    buckets: tuple[tuple[int, int], ...]
    server_version: str
    request_id: str
    semantics: Semantics
    times: Times

    @property
    def logprobs(self) -> Floats:
        """[positions]: the log-probability of each token given those before it, in nats."""
        return self.tensors.get("logprobs")

    @property
    def entropy(self) -> Floats:
        """[positions]: the entropy of what may stand at each token given those before, in nats."""
        return self.tensors.get("entropy")

    @property
    def top_k_ids(self) -> list[NDArray[np.int32]] | None:
        """[positions, k]: the tokens most probable at each token given those before, best first."""
        return self.tensors.get("top_k_ids")

    @property
    def top_k_logprobs(self) -> Floats:
        """[positions, k]: the log-probabilities of `top_k_ids`."""
        return self.tensors.get("top_k_logprobs")

    @property
    def candidates(self) -> Floats:
        """[positions, candidates]: log-probabilities at each token given those before it."""
        return self.tensors.get("candidates")

    @property
    def logits(self) -> Floats:
        """[positions, vocabulary]: what the model says after each token, of the next one."""
        return self.tensors.get("logits")

    @property
    def hidden(self) -> Floats:
        """[positions, width]: the hidden state after each token, or at the chosen positions."""
        return self.tensors.get("hidden")

    @property
    def score(self) -> Floats:
        """[segments, labels]: after the last token of each segment, or at the chosen positions."""
        return self.tensors.get("score")


SAME = ("handle", "revision", "weights_digest", "weights_version")
"""What says that two answers are of the same weights; so named by `Scores` and on the wire."""


def joined(parts: Sequence[Scores]) -> Scores:
    """Puts the answers to the requests of one batch together.

    Args:
        parts: The answers, in the order of their rows.

    Returns:
        One answer; no array is copied.

    Raises:
        FailedPrecondition: They are of different weights.
        DataLoss: They hold different tensors.
    """
    first = parts[0]
    for part in parts[1:]:
        check_same(first, part)
        if part.tensors.keys() != first.tensors.keys():
            raise DataLoss(f"one answer holds {list(first.tensors)}, one {list(part.tensors)}")
    return replace(
        first,
        tensors={
            name: list(chain.from_iterable(part.tensors[name] for part in parts))
            for name in first.tensors
        },
        buckets=tuple(dict.fromkeys(bucket for part in parts for bucket in part.buckets)),
        request_id=",".join(part.request_id for part in parts),
        times=_times([part.times for part in parts]),
    )


def check_same(one: Any, other: Any) -> None:
    """Compares where two answers come from.

    Args:
        one: Scores, or a header of the wire.
        other: Another.

    Raises:
        FailedPrecondition: They are of different weights.
    """
    for name in SAME:
        before, after = getattr(one, name), getattr(other, name)
        if before != after:
            raise FailedPrecondition(
                f"the weights changed while the rows were scored: {name} was {before!r} and is "
                f"{after!r}; call forward() again",
                reason="WEIGHTS_VERSION_MISMATCH",
            )


def _times(times: Sequence[Times]) -> Times:
    sums = {f.name: sum(getattr(t, f.name) for t in times) for f in fields(Times)}
    return Times(**{**sums, "queue": max(t.queue for t in times)})
