"""Requests of the wire, made from Python values; wrong values are refused before they are sent."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from moorage.errors import InvalidRequest
from moorage.scores import OUTPUTS
from moorage.v1 import moorage_pb2 as pb

Rows: TypeAlias = Iterable[Any]
"""Ragged rows of integers: a list of lists or integer arrays, or one array [rows, length]."""

SOURCES: Mapping[str, pb.ModelSource] = {
    "huggingface": pb.MODEL_SOURCE_HUGGINGFACE,
    "kaggle": pb.MODEL_SOURCE_KAGGLE,
    "gcs": pb.MODEL_SOURCE_GCS,
    "internal": pb.MODEL_SOURCE_INTERNAL,
    "maxtext": pb.MODEL_SOURCE_MAXTEXT,
}


def spec(
    model_id: str,
    source: str | None,
    options: Mapping[str, str] | None = None,
    **fields: str | None,
) -> pb.ModelSpec:
    """Says which model is wanted.

    Args:
        model_id: A Hugging Face id or a config id.
        source: A key of `SOURCES`, in any case, or None for the server's default.
        options: What a checkpoint does not tell of itself, by name.
        **fields: Other fields of ModelSpec; None counts as left out.

    Returns:
        The message.

    Raises:
        InvalidRequest: The source is unknown, or a value is no string.
    """
    if source is not None and str(source).lower() not in SOURCES:
        raise InvalidRequest(f"unknown source {source!r}; known are {', '.join(SOURCES)}")
    number = None if source is None else SOURCES[str(source).lower()]
    try:
        message = pb.ModelSpec(model_id=model_id, source=number, options=options)
        message.MergeFrom(pb.ModelSpec(**cast(Any, fields)))
        return message
    except TypeError as error:
        raise InvalidRequest(f"a model is named by strings: {error}") from error


def resolve_name(
    model: pb.ModelSpec, *, estimate: bool, check_source: bool | None
) -> pb.ResolveNameRequest:
    """Asks what a name means.

    Args:
        model: What is wanted.
        estimate: Also ask for the bytes on each device.
        check_source: Look into the source; None does so if the model names one.

    Returns:
        The message.
    """
    if check_source is None:
        check_source = model.source != pb.MODEL_SOURCE_UNSPECIFIED
    return pb.ResolveNameRequest(model=model, check_source=check_source, estimate=estimate)


def load_model(
    model: pb.ModelSpec, *, lease: float | None, client_name: str, cancel_if_abandoned: bool
) -> pb.LoadModelRequest:
    """Asks for a model.

    Args:
        model: What is wanted.
        lease: How long a lease on it lasts unless it is renewed, in seconds; None for no lease.
        client_name: Who takes the lease; "" for the user, the host and the process.
        cancel_if_abandoned: Whether the load may end once everybody has left who waits for it.

    Returns:
        The message.

    Raises:
        InvalidRequest: The lease is no positive number of seconds, or the name is no string.
    """
    request = pb.LoadModelRequest(model=model, cancel_if_abandoned=cancel_if_abandoned)
    if lease is None:
        return request
    try:
        request.lease.client = client_name or default_client_name()
        request.lease.duration.FromNanoseconds(round(lease * 1e9))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"a lease of {lease!r} for {client_name!r}: {error}") from error
    if request.lease.duration.ToNanoseconds() <= 0:
        raise InvalidRequest(f"a lease of {lease!r} s; give more than 0, or None for no lease")
    return request


def default_client_name() -> str:
    """Names this process for people: user@host and the process's number."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        user = "unknown"
    return f"{user}@{socket.gethostname()} {os.getpid()}"


def forward(
    handle: str, rows: Rows, outputs: Sequence[str], segment_ids: Rows | None
) -> pb.ForwardRequest:
    """Asks for a forward pass.

    Args:
        handle: The model's handle.
        rows: Ragged rows of token ids.
        outputs: Keys of `moorage.scores.OUTPUTS`.
        segment_ids: Shaped as `rows`, or None: each row is one segment.

    Returns:
        The message, rows packed one after another.

    Raises:
        InvalidRequest: An output is unknown, or rows are not rows of 32-bit integers.
    """
    token_ids, lengths = pack(rows, "rows")
    segments: list[int] = []
    segment_lengths = lengths
    if segment_ids is not None:
        segments, segment_lengths = pack(segment_ids, "segment_ids")
    if segment_lengths != lengths:
        raise InvalidRequest("segment_ids and rows differ in shape; give one id for each token")
    return pb.ForwardRequest(
        handle=handle,
        token_ids=token_ids,
        row_lengths=lengths,
        segment_ids=segments,
        outputs=_outputs(outputs),
    )


def pack(rows: Rows, name: str) -> tuple[list[int], list[int]]:
    """Puts ragged rows one after another.

    Args:
        rows: Ragged rows of integers.
        name: What they are called in errors.

    Returns:
        All values, and the length of each row.

    Raises:
        InvalidRequest: There is no row, or a row is empty or not of 32-bit integers.
    """
    try:
        table = np.asarray(rows) if hasattr(rows, "__array__") else rows
        arrays = [_row(row, f"{name}[{index}]") for index, row in enumerate(table)]
    except TypeError as error:
        raise InvalidRequest(f"{name} must be a list of rows of integers: {error}") from error
    if not arrays:
        raise InvalidRequest(f"{name} holds no row; give at least one")
    return np.concatenate(arrays).tolist(), [array.size for array in arrays]


def _outputs(outputs: Sequence[str]) -> pb.OutputSpec:
    wanted = [outputs] if isinstance(outputs, str) else list(outputs or ())
    unknown = [name for name in wanted if name not in OUTPUTS]
    if unknown:
        raise InvalidRequest(f"unknown outputs {unknown}; known are {', '.join(OUTPUTS)}")
    return pb.OutputSpec(**dict.fromkeys(wanted, True))


def _row(row: Any, name: str) -> NDArray[np.int32]:
    try:
        array = np.asarray(row)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{name}: {error}") from error
    if array.ndim == 1 and array.size == 0:
        raise InvalidRequest(f"{name} is empty; leave the row out", reason="ROW_EMPTY")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidRequest(
            f"{name} must be a flat row of integers, not {array.dtype} {list(array.shape)}"
        )
    if array.min() < -(2**31) or array.max() >= 2**31:
        raise InvalidRequest(
            f"{name} holds {array.min()} to {array.max()}; 32-bit integers are sent",
            reason="TOKEN_OUT_OF_RANGE",
        )
    return array.astype(np.int32, copy=False)
