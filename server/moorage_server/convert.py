"""Between the server's dataclasses and the wire's messages."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from moorage.v1 import moorage_pb2 as pb
from moorage_models.checkpoint import Checkpoint
from moorage_models.config import ModelConfig
from moorage_models.dtypes import ITEM_BYTES
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import Stage
from moorage_models.naming import ModelNaming
from moorage_models.plan import Plan
from moorage_models.sources import ModelRequest, ModelSource
from moorage_models.tokenizer_facts import TokenizerFacts
from moorage_server.activity import Refusal
from moorage_server.engine import Bucket
from moorage_server.leases import Lease
from moorage_server.lifecycle import State
from moorage_server.model import Model, Snapshot

_PREFIX = "MODEL_SOURCE_"

# What a caller says of a model or a lease is told to everybody: bytes, as file systems count.
_MAX_NAME_BYTES, _MAX_PATH_BYTES, _MAX_OPTIONS = 256, 4096, 16
_NAMES = ("model_id", "revision", "dtype", "compute_dtype")
_PATHS = ("model_path", "model_download_path")


def to_request(spec: pb.ModelSpec) -> ModelRequest:
    """What a caller wants.

    Raises:
        ModelError: INVALID_REQUEST for a source that this version does not know, and for names that
            are too long or cannot be shown.
    """
    _check_texts(spec)
    number = spec.source or pb.MODEL_SOURCE_HUGGINGFACE
    if number not in pb.ModelSource.values():
        raise ModelError(Reason.INVALID_REQUEST, f"there is no source with number {number}")
    source = ModelSource[pb.ModelSource.Name(number).removeprefix(_PREFIX)]
    return ModelRequest(
        spec.model_id,
        source,
        spec.model_path,
        spec.revision,
        spec.model_download_path,
        spec.dtype,
        spec.compute_dtype,
        tuple(sorted(spec.options.items())),
    )


def _check_texts(spec: pb.ModelSpec) -> None:
    for field in _PATHS:
        _check_size(field, getattr(spec, field), _MAX_PATH_BYTES)
    for field in _NAMES:
        check_name(field, getattr(spec, field))
    if len(spec.options) > _MAX_OPTIONS:
        raise ModelError(
            Reason.INVALID_REQUEST,
            f"options has {len(spec.options)} entries; it may have {_MAX_OPTIONS}",
        )
    for text in (text for option in spec.options.items() for text in option):
        check_name("options", text)


def check_name(field: str, name: str) -> None:
    """Refuses a name that is too long, or cannot be shown.

    Args:
        field: The field that has it.
        name: The name.

    Raises:
        ModelError: INVALID_REQUEST.
    """
    _check_size(field, name, _MAX_NAME_BYTES)
    if not name.isprintable():
        raise ModelError(
            Reason.INVALID_REQUEST, f"{field} has characters that cannot be shown: {name!r}"
        )


def _check_size(field: str, text: str, most: int) -> None:
    if (size := len(text.encode())) > most:
        raise ModelError(Reason.INVALID_REQUEST, f"{field} has {size} bytes; it may have {most}")


def to_spec(request: ModelRequest) -> pb.ModelSpec:
    """A request as the wire has it."""
    return pb.ModelSpec(
        model_id=request.model_id,
        source=source_name(request.source),
        model_path=request.model_path,
        revision=request.revision,
        model_download_path=request.download_path,
        dtype=request.dtype,
        compute_dtype=request.compute_dtype,
        options=dict(request.options),
    )


def source_name(source: ModelSource) -> str:
    """A source as the wire names it."""
    return _PREFIX + source.name


def to_name(naming: ModelNaming | None, model_id: str) -> pb.ModelName:
    """The naming attributes; of an id that follows no rule, only the id and its last segment."""
    if naming is None:
        return pb.ModelName(model_id=model_id, model_name=model_id.rsplit("/", 1)[-1].lower())
    return pb.ModelName(
        model_id=naming.model_id or "",
        model_name=naming.model_name,
        model_family=naming.model_family,
        model_version=naming.model_version,
        model_config_category=naming.model_config_category,
        model_config_id=naming.model_config_id,
    )


def to_config(config: ModelConfig) -> pb.ConfigSummary:
    """The numbers of a configuration."""
    return pb.ConfigSummary(
        family=config.family,
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        hidden_dim=config.hidden_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_parameters=config.num_parameters,
    )


def to_progress(model: Model) -> pb.LoadProgress:
    """How far a load has come."""
    return pb.LoadProgress(
        state=f"MODEL_STATE_{model.state}",
        stages=to_stages(model.monitor.stages()),
        waiters=model.waiters,
        elapsed=duration(time.time() - model.started),
    )


def to_stages(stages: Mapping[str, Stage]) -> list[pb.StageProgress]:
    """How far each stage of a load is."""
    return [
        pb.StageProgress(stage=name, done=stage.done, total=stage.total, rate=stage.rate)
        for name, stage in stages.items()
    ]


def to_model(snapshot: Snapshot, now: float) -> pb.Model:
    """A model as the wire describes it.

    Args:
        snapshot: The model.
        now: The time on the clock of the leases.
    """
    model, checkpoint = snapshot.model, snapshot.model.checkpoint
    message = pb.Model(
        handle=model.handle,
        state=f"MODEL_STATE_{model.state}",
        name=to_name(checkpoint.naming, checkpoint.request.model_id),
        spec=to_spec(checkpoint.request),
        revision=checkpoint.repository.revision,
        path=checkpoint.repository.label,
        config=to_config(checkpoint.config),
        dtype=checkpoint.plan.dtype,
        compute_dtype=checkpoint.compute_dtype,
        device_bytes=to_device_bytes(model.device_bytes),
        load_time=timestamp(model.started),
        load_duration=duration(model.load_seconds),
        forward_count=model.forwards,
        token_count=model.tokens,
        preset_differences=checkpoint.preset_differences,
        tokenizer=to_tokenizer(checkpoint.tokenizer),
        leases=[to_lease(lease, now, shown_to_others=True) for lease in snapshot.leases],
        history=[
            pb.StateChange(state=f"MODEL_STATE_{state}", time=timestamp(time))
            for state, time in model.history.items()
        ],
        running_count=model.in_use,
        reserved_bytes=snapshot.reserved,
        weights_digest=model.weights_digest,
        client=model.client,
        buckets=to_buckets(model.buckets),
    )
    if model.last_use:
        message.last_use_time.CopyFrom(timestamp(model.last_use))
    if model.state in (State.QUEUED, State.LOADING):
        message.progress.CopyFrom(to_progress(model))
    return message


def to_buckets(buckets: Iterable[Bucket]) -> list[pb.Bucket]:
    """Compiled shapes, the shortest first."""
    return [pb.Bucket(rows=bucket.rows, length=bucket.length) for bucket in sorted(buckets)]


def to_layout(plan: Plan[Any], mesh: Mapping[str, int]) -> list[pb.ParameterLayout]:
    """How the parameters of a plan lie on a mesh, the largest first."""
    largest = sorted(plan.parameters, key=lambda p: -math.prod(p.shape) * ITEM_BYTES[p.dtype])
    return [
        pb.ParameterLayout(
            name=p.name, shape=p.shape, dtype=p.dtype, axes=map(",".join, p.spec(mesh))
        )
        for p in largest
    ]


def to_counts(counts: Mapping[str, int]) -> list[pb.Count]:
    """How often something was so, by its name."""
    return [pb.Count(name=name, count=count) for name, count in sorted(counts.items())]


def to_recent_error(refusal: Refusal) -> pb.RecentError:
    """A request that was refused or failed."""
    return pb.RecentError(
        time=timestamp(refusal.time),
        method=refusal.call.method,
        reason=refusal.reason,
        message=refusal.message,
        request_id=refusal.call.request_id,
        client=refusal.call.caller.name,
    )


def to_lease(lease: Lease, now: float, *, shown_to_others: bool = False) -> pb.Lease:
    """A lease; its id is only for its holder."""
    return pb.Lease(
        id="" if shown_to_others else lease.id,
        client=lease.client,
        duration=duration(lease.seconds),
        time_left=duration(max(0.0, lease.expires - now)),
    )


def to_tokenizer(facts: TokenizerFacts) -> pb.TokenizerFacts:
    """What is known of the tokenizer."""
    return pb.TokenizerFacts(
        files=facts.files,
        bos_id=facts.bos_id,
        eos_ids=facts.eos_ids,
        pad_id=facts.pad_id,
        has_chat_template=facts.has_chat_template,
    )


def to_device_bytes(amounts: Mapping[int, int]) -> list[pb.DeviceBytes]:
    """Bytes by device id."""
    return [pb.DeviceBytes(device_id=d, bytes=n) for d, n in sorted(amounts.items())]


def loadable(checkpoint: Checkpoint) -> pb.ResolveNameResponse:
    """The answer for a checkpoint that was looked into and can be loaded."""
    return pb.ResolveNameResponse(
        name=to_name(checkpoint.naming, checkpoint.request.model_id),
        checked=["name", "source", "config", "headers"],
        loadable=True,
        config=to_config(checkpoint.config),
        revision=checkpoint.repository.revision,
        preset_differences=checkpoint.preset_differences,
    )


def duration(seconds: float) -> Duration:
    """A span of time."""
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def timestamp(seconds: float) -> Timestamp:
    """A time in seconds since the epoch."""
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
