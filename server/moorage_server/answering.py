"""Forward on the wire: from the request to what is wanted, from the answer to its messages."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np

from moorage.v1 import moorage_pb2 as pb
from moorage_server import __version__
from moorage_server.convert import duration, to_buckets
from moorage_server.engine import EngineInfo
from moorage_server.errors import Reason, ServerError
from moorage_server.jobs import Job
from moorage_server.model import WEIGHTS_VERSION
from moorage_server.requests import Wanted

#: The most bytes of a chunk: with its envelope, a message stays under half a mebibyte, for which
#: protobuf's buffer is doubled one time less.
CHUNK_BYTES = 508 << 10

_HEAD_DTYPE = "float32"
_ENUMS = {
    "first_token": pb.FirstToken,
    "logit_scale": pb.LogitScale,
    "segments": pb.SegmentMode,
}


def fingerprint(request: pb.ForwardRequest) -> bytes:
    """A digest of what is asked, wherever its answer shall go on."""
    whole = pb.ForwardRequest()
    whole.CopyFrom(request)
    whole.received_bytes = 0
    return hashlib.sha256(whole.SerializeToString(deterministic=True)).digest()


def to_wanted(request: pb.ForwardRequest) -> Wanted:
    """What a request wants, with what stands for fields that are left out.

    Raises:
        ServerError: INVALID_REQUEST or OUTPUT_NOT_SERVED for what is not offered.
    """
    outputs, semantics = request.outputs, request.semantics
    _check(semantics)
    return Wanted(
        outputs=tuple(dict.fromkeys(outputs.names)) or ("logprobs",),
        top_k=outputs.top_k,
        **_candidates(outputs.candidates),
        layer=outputs.layer if outputs.HasField("layer") else None,
        positions=np.array(outputs.positions, np.int32),
        from_positions=tuple(request.from_positions),
        temperature=semantics.temperature or 1.0,
        scales_logits=semantics.logit_scale == pb.LOGIT_SCALE_SCALED,
        first_value=0.0 if semantics.first_token == pb.FIRST_TOKEN_ZERO else math.nan,
    )


def header(job: Job, info: EngineInfo) -> pb.ForwardHeader:
    """What answered, and how."""
    work, checkpoint, timings = job.work, job.model.checkpoint, job.work.timings
    started = job.taken if job.started is None else job.started
    return pb.ForwardHeader(
        handle=job.model.handle,
        model_id=checkpoint.request.model_id,
        revision=checkpoint.repository.revision,
        dtype=checkpoint.plan.dtype,
        compute_dtype=checkpoint.compute_dtype,
        tensors=[
            pb.TensorHeader(
                name=name,
                dtype=tensor.dtype.name,
                shape=tensor.shape,
                row_lengths=work.row_lengths[name],
            )
            for name, tensor in work.tensors.items()
        ],
        queue_time=duration(started - job.taken),
        execute_time=duration(timings.execute),
        semantics=_semantics(work.wanted),
        weights_digest=job.model.weights_digest,
        weights_version=WEIGHTS_VERSION,
        mesh=[pb.MeshAxis(name=name, size=size) for name, size in info.mesh.items()],
        buckets=to_buckets(work.buckets),
        pad_time=duration(timings.pad),
        transfer_time=duration(timings.transfer),
        request_id=job.request_id,
        server_version=__version__,
    )


def chunks(tensors: Sequence[np.ndarray], received: int = 0) -> Iterator[pb.ForwardResponse]:
    """The tensors' little-endian bytes in order.

    Args:
        tensors: The tensors.
        received: How many of the bytes the caller has already.

    Raises:
        ServerError: INVALID_REQUEST if there are not so many.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    if not 0 <= received <= total:
        raise ServerError(
            Reason.INVALID_REQUEST, f"received_bytes is {received}; the answer has {total} bytes"
        )
    return _chunks(tensors, received)


def _chunks(tensors: Sequence[np.ndarray], skipped: int) -> Iterator[pb.ForwardResponse]:
    for number, tensor in enumerate(tensors):
        little = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<"))
        view = memoryview(little.reshape(-1).view(np.uint8).data)
        for offset in range(min(skipped, len(view)), len(view), CHUNK_BYTES):
            data = bytes(view[offset : offset + CHUNK_BYTES])
            checksum = google_crc32c.value(data)
            chunk = {"tensor": number, "offset": offset, "crc32c": checksum, "data": data}
            yield pb.ForwardResponse(chunk=chunk)  # in place: a message would be copied
        skipped = max(0, skipped - len(view))


def _candidates(candidates: pb.Candidates) -> dict[str, Any]:
    """The candidates of `Wanted`, one set after another."""
    if candidates.ids and candidates.ids_by_position:
        raise ServerError(
            Reason.INVALID_REQUEST, "give candidates as ids or as ids_by_position, not as both"
        )
    if candidates.ids:
        ids = np.array(candidates.ids, np.int32)
        return {"candidates": ids, "candidate_count": len(ids)}
    if len(candidates.ids_by_position) % 4:
        raise ServerError(Reason.INVALID_REQUEST, "ids_by_position is not made of int32")
    ids = np.frombuffer(candidates.ids_by_position, "<i4").astype(np.int32)
    return {"candidates": ids, "candidate_count": candidates.count}


def _check(semantics: pb.Semantics) -> None:
    if semantics.head_dtype not in ("", _HEAD_DTYPE):
        raise ServerError(
            Reason.OUTPUT_NOT_SERVED,
            f"the head is computed in {_HEAD_DTYPE}, not in {semantics.head_dtype!r}",
        )
    for name, kind in _ENUMS.items():
        if (number := getattr(semantics, name)) not in kind.values():
            raise ServerError(
                Reason.INVALID_REQUEST,
                f"{name} {number} is unknown to this server; it knows {', '.join(kind.keys())}",
            )


def _semantics(wanted: Wanted) -> pb.Semantics:
    scaled, is_nan = wanted.scales_logits, math.isnan(wanted.first_value)
    return pb.Semantics(
        temperature=wanted.temperature,
        head_dtype=_HEAD_DTYPE,
        first_token=pb.FIRST_TOKEN_NAN if is_nan else pb.FIRST_TOKEN_ZERO,
        logit_scale=pb.LOGIT_SCALE_SCALED if scaled else pb.LOGIT_SCALE_RAW,
        segments=pb.SEGMENT_MODE_ISOLATED,
    )
