"""Requests of the wire, made from Python values; wrong values are refused before they are sent.

Those for forward passes are in `batch`.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping
from typing import Any, cast

from moorage.errors import InvalidRequest
from moorage.v1 import moorage_pb2 as pb

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
