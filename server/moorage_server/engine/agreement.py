"""Shapes in which a row gets the same bits: tried before a model is served, not believed.

A compiler may take another kernel for another number of rows, which may add up in another order. So
the shapes of one length that do not agree with the largest are not used: then a row's shape follows
from its own length alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from moorage_models.dtypes import ITEM_BYTES
from moorage_models.errors import ModelError, Reason
from moorage_server.engine.api import Batch, Bucket, Probe

#: How many tokens of each length are tried in half precision, where another order of sums shows
#: only where it crosses a rounding: of two layers in one token of a thousand, of more in more.
HALF_PRECISION_TOKENS = 8192


def probes(buckets: Iterable[Bucket], compute_dtype: str, devices: int) -> list[Probe]:
    """What must be tried of some buckets: where a row may come to lie in more than one way.

    In full precision another order shows in any row: one, in the first and the last place of each
    bucket. In half precision many rows run in every bucket of their length, and in the largest
    once more, each at another place and with other neighbours.

    Args:
        buckets: The buckets.
        compute_dtype: The dtype of the arithmetic.
        devices: Over how many devices rows are split.
    """
    found = []
    for largest in _largest(buckets).values():
        own = [bucket for bucket in sorted(buckets) if bucket.length == largest.length]
        if len(own) == 1 and largest.rows == devices:
            continue
        if ITEM_BYTES[compute_dtype] > 2:
            found += [Probe(bucket, (*range(bucket.rows - 1), 0)) for bucket in own]
            continue
        batches = -(-HALF_PRECISION_TOKENS // (largest.rows * largest.length))
        rows = list(range(batches * largest.rows))
        for bucket in own:
            found += _batches(bucket, rows)
        found += _batches(largest, rows[1:] + rows[:1])
    return found


def batch_of(probe: Probe, vocabulary: int) -> Batch:
    """The batch of a probe: random rows, every other of which ends in its second half."""
    bucket, length = probe.bucket, probe.bucket.length
    tokens, segments = np.zeros((2, bucket.rows, length), np.int32)
    for place, number in enumerate(probe.rows):
        rng = np.random.default_rng((length, number))
        end = rng.integers(length // 2, length) if number % 2 else length
        tokens[place, :end] = rng.integers(0, vocabulary, end)
        segments[place, :end] = 1
    positions = np.tile(np.arange(length, dtype=np.int32), (bucket.rows, 1))
    return Batch(tokens, segments, positions * segments)


def agreeing(
    buckets: Iterable[Bucket], found: Mapping[Probe, Sequence[bytes]]
) -> tuple[Bucket, ...]:
    """Those of some buckets in which rows get the bits that they get in the largest.

    Args:
        buckets: The buckets.
        found: A digest of each row's values, by probe.

    Returns:
        The buckets to use, shortest first.

    Raises:
        ModelError: CHECKPOINT_UNSUPPORTED if a row's bits depend on its place or its neighbours.
    """
    given: dict[Bucket, dict[int, set[bytes]]] = {bucket: {} for bucket in sorted(buckets)}
    for probe, digests in found.items():
        for row, digest in zip(probe.rows, digests, strict=True):
            given[probe.bucket].setdefault(row, set()).add(digest)
    largest = _largest(given)
    for bucket in largest.values():
        if any(len(digests) > 1 for digests in given[bucket].values()):
            raise ModelError(
                Reason.CHECKPOINT_UNSUPPORTED,
                f"in {bucket.rows} rows of {bucket.length} tokens this model gives a row other "
                "numbers at another place; serve it with other buckets",
            )
    return tuple(
        bucket
        for bucket, own in given.items()
        if all(digests == given[largest[bucket.length]][row] for row, digests in own.items())
    )


def proven(
    buckets: Sequence[Bucket],
    compute_dtype: str,
    devices: int,
    run: Callable[[Probe], Sequence[bytes]],
) -> tuple[Bucket, ...]:
    """Those of some buckets that agree, tried one after another; see `probes` and `agreeing`."""
    tried = probes(buckets, compute_dtype, devices)
    return agreeing(buckets, {probe: run(probe) for probe in tried})


def _largest(buckets: Iterable[Bucket]) -> dict[int, Bucket]:
    """The bucket with the most rows, by length."""
    return {bucket.length: bucket for bucket in sorted(buckets)}


def _batches(bucket: Bucket, rows: Sequence[int]) -> list[Probe]:
    """Batches that together hold some rows, which fill them."""
    starts = range(0, len(rows), bucket.rows)
    return [Probe(bucket, tuple(rows[start : start + bucket.rows])) for start in starts]
