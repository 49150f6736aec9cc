"""Shapes in which a row gets the same bits: tried before a model is served, not believed.

A compiler may take another kernel for another number of rows, which may add up in another order. So
the shapes of one length that do not agree with the largest are not used: then a row's shape follows
from its own length alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import attrgetter

import numpy as np
from jaxtyping import Float32, Int32

from moorage_server.engine.api import Batch, Bucket

#: From a batch to its hidden states.
Trunk = Callable[[Batch], Float32[np.ndarray, "rows length d"]]


def agreeing(buckets: Iterable[Bucket], vocabulary: int, trunk: Trunk) -> Iterator[Bucket]:
    """Those of some buckets in which any row gets the bits that it gets in the largest.

    Args:
        buckets: The buckets. Those that are alone with their length are not tried.
        vocabulary: How many tokens there are.
        trunk: Runs a batch.

    Yields:
        The buckets to use, shortest first.
    """
    for length, group in groupby(sorted(buckets), key=attrgetter("length")):
        *smaller, largest = group
        tokens = np.random.default_rng(length).integers(0, vocabulary, length, np.int32)
        wanted = trunk(_filled(largest, tokens))[0] if smaller else None
        yield from (
            bucket
            for bucket in smaller
            if all(same(row, wanted) for row in trunk(_filled(bucket, tokens)))
        )
        yield largest


def same(one: np.ndarray, other: np.ndarray | None) -> bool:
    """Whether two arrays have the same bits."""
    return other is not None and one.tobytes() == other.tobytes()


def _filled(bucket: Bucket, tokens: Int32[np.ndarray, " length"]) -> Batch:
    """A batch of the same row again and again, without padding."""
    rows = np.tile(tokens, (bucket.rows, 1))
    positions = np.tile(np.arange(bucket.length, dtype=np.int32), (bucket.rows, 1))
    return Batch(rows, np.ones_like(rows), positions)
