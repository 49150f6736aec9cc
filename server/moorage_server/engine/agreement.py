"""Shapes in which a row gets the same bits: tried before a model is served, not believed.

A compiler may take another kernel for another number of rows, which may add up in another order. So
the shapes of one length that do not agree with the largest are not used: then a row's shape follows
from its own length alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
from jaxtyping import Int32

from moorage_models.errors import ModelError, Reason
from moorage_server.engine.api import Batch, Bucket

#: Digests of what one row gave at some places of a batch.
Digests = frozenset[bytes]


def disputed(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Those of some buckets that share their length with others."""
    found = sorted(buckets)
    lengths = [bucket.length for bucket in found]
    return [bucket for bucket in found if lengths.count(bucket.length) > 1]


def probe(bucket: Bucket, vocabulary: int) -> Batch:
    """A batch whose first and last rows are the same in all batches of its length.

    The others are random, and end somewhere in their second half.
    """
    length, rng = bucket.length, np.random.default_rng(bucket.length)
    tokens: Int32[np.ndarray, " length"] = rng.integers(0, vocabulary, length, np.int32)
    rows = rng.integers(0, vocabulary, (bucket.rows, length), np.int32)
    segments = np.arange(length) < rng.integers(length // 2, length + 1, (bucket.rows, 1))
    rows[0], rows[-1] = tokens, tokens
    segments[0], segments[-1] = True, True
    positions = np.tile(np.arange(length, dtype=np.int32), (bucket.rows, 1))
    return Batch(rows, segments.astype(np.int32), positions)


def agreeing(buckets: Iterable[Bucket], found: Mapping[Bucket, Digests]) -> tuple[Bucket, ...]:
    """Those of some buckets in which a row gets the bits that it gets in the largest.

    Args:
        buckets: The buckets.
        found: What the probes of the disputed ones gave.

    Returns:
        The buckets to use, shortest first.

    Raises:
        ModelError: CHECKPOINT_UNSUPPORTED if a row's bits depend on its place or its neighbours.
    """
    largest = {bucket.length: bucket for bucket in sorted(buckets)}
    for bucket in largest.values():
        if len(found.get(bucket, ())) > 1:
            raise ModelError(
                Reason.CHECKPOINT_UNSUPPORTED,
                f"in {bucket.rows} rows of {bucket.length} tokens this model gives a row other "
                "numbers at another place; serve it with other buckets",
            )
    return tuple(
        bucket
        for bucket in sorted(buckets)
        if found.get(bucket) == found.get(largest[bucket.length])
    )


def proven(buckets: Collection[Bucket], run: Callable[[Bucket], Digests]) -> tuple[Bucket, ...]:
    """Those of some buckets that agree, tried one after another; see `agreeing`."""
    return agreeing(buckets, {bucket: run(bucket) for bucket in disputed(buckets)})
