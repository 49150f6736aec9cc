"""From the messages of the wire to the dataclasses of `answers`; pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import Message
from numpy.typing import NDArray

from moorage.answers import Lease, LoadProgress, Model, Scorer, Stage, T_co, Tokenizer
from moorage.enums import name_of
from moorage.naming import BudgetEstimate, Config, Resolution, SupportedModel
from moorage.scores import Scores, Semantics, Times
from moorage.server_info import (
    Activity,
    Device,
    Limits,
    Memory,
    OutputProfile,
    ParameterLayout,
    RecentError,
    ServerInfo,
)
from moorage.v1 import moorage_pb2 as pb


def resolution(message: pb.ResolveNameResponse) -> Resolution:
    """Decodes the answer of ResolveName."""
    return Resolution(
        **_shared(Resolution, message.name),
        checked=tuple(message.checked),
        loadable=message.loadable,
        reason=message.reason,
        message=message.message,
        config=_config(message.config) if message.HasField("config") else None,
        revision=message.revision,
        device_bytes=device_bytes(message.device_bytes),
        preset_differences=tuple(message.preset_differences),
        budget=_budget(message.budget) if message.HasField("budget") else None,
    )


def supported_models(message: pb.ListSupportedModelsResponse) -> list[SupportedModel]:
    """Decodes the answer of ListSupportedModels."""
    return [
        SupportedModel(preset.model_config_id, preset.model_config_category, _config(preset.config))
        for preset in message.models
    ]


def load_progress(message: pb.LoadProgress) -> LoadProgress:
    """Decodes the progress of a load."""
    return LoadProgress(
        state=name_of(pb.ModelState, message.state),
        stages={
            stage.stage: Stage(stage.done, stage.total, stage.rate) for stage in message.stages
        },
        waiters=message.waiters,
        elapsed_seconds=_seconds(message, "elapsed"),
    )


def lease(message: pb.Lease) -> Lease:
    """Decodes a lease."""
    return Lease(
        id=message.id,
        client=message.client,
        seconds=_seconds(message, "duration"),
        seconds_left=_seconds(message, "time_left"),
    )


def model(message: pb.Model, client: Scorer[T_co]) -> Model[T_co]:
    """Decodes a model.

    Args:
        message: Its description.
        client: Runs its forward passes.

    Returns:
        The model, bound to the client.
    """
    return Model(
        handle=message.handle,
        state=name_of(pb.ModelState, message.state),
        model_id=message.spec.model_id,
        model_config_id=message.name.model_config_id,
        source=name_of(pb.ModelSource, message.spec.source),
        path=message.path,
        revision=message.revision,
        config=_config(message.config),
        dtype=message.dtype,
        compute_dtype=message.compute_dtype,
        device_bytes=device_bytes(message.device_bytes),
        load_time=_time(message, "load_time"),
        load_seconds=_seconds(message, "load_duration"),
        last_use_time=_time(message, "last_use_time"),
        forward_count=message.forward_count,
        token_count=message.token_count,
        progress=load_progress(message.progress) if message.HasField("progress") else None,
        preset_differences=tuple(message.preset_differences),
        tokenizer=_tokenizer(message.tokenizer),
        leases=tuple(map(lease, message.leases)),
        history={
            name_of(pb.ModelState, change.state): change.time.ToDatetime(tzinfo=UTC)
            for change in message.history
        },
        running_count=message.running_count,
        reserved_bytes=message.reserved_bytes,
        requested_by=message.client,
        buckets=_buckets(message.buckets),
        client=client,
    )


def layout(message: pb.GetModelResponse) -> tuple[ParameterLayout, ...]:
    """Decodes how a model lies on the mesh, the largest parameters first."""
    return tuple(
        ParameterLayout(p.name, tuple(p.shape), p.dtype, tuple(map(_mesh_axes, p.axes)))
        for p in message.layout
    )


def _mesh_axes(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def device_bytes(messages: Iterable[pb.DeviceBytes]) -> dict[int, int]:
    """Decodes amounts of memory: bytes by device id."""
    return {message.device_id: message.bytes for message in messages}


def server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    """Decodes the answer of GetServerInfo."""
    return ServerInfo(
        version=message.version,
        platform=message.platform,
        devices=tuple(Device(d.id, d.kind, d.model_bytes) for d in message.devices),
        mesh=_mesh(message.mesh),
        buckets=_buckets(message.buckets),
        **_shared(ServerInfo, message.limits),
        answer_retention_seconds=_seconds(message.limits, "answer_retention"),
        sources=tuple(name_of(pb.ModelSource, source) for source in message.sources),
        outputs=tuple(message.outputs),
        start_time=_time(message, "start_time"),
        memory=Memory(
            budget_bytes=message.memory.budget_bytes,
            reserved_bytes=message.memory.reserved_bytes,
            live_bytes=device_bytes(message.memory.live_bytes),
            host_pool_bytes=message.memory.host_pool_bytes,
        ),
        profiles=tuple(OutputProfile(tuple(p.outputs), p.size) for p in message.profiles),
        compiles_after_ready=message.compiles_after_ready,
        limits=Limits(
            **{field.name: getattr(message.limits, f"max_{field.name}") for field in fields(Limits)}
        ),
        activity=_activity(message.activity),
    )


def _activity(message: pb.Activity) -> Activity:
    return Activity(
        **_shared(Activity, message)
        | {
            "loads": {count.name: count.count for count in message.loads},
            "refusals": {count.name: count.count for count in message.refusals},
            "errors": tuple(
                RecentError(**{**_shared(RecentError, error), "time": _time(error, "time")})
                for error in message.errors
            ),
        }
    )


def scores(header: pb.ForwardHeader, tensors: Mapping[str, list[NDArray[Any]]]) -> Scores:
    """Decodes the answer of Forward.

    Args:
        header: Its header.
        tensors: Its tensors by name, one array for each row.

    Returns:
        The scores.
    """
    semantics = header.semantics
    return Scores(
        **_shared(Scores, header)
        | {
            "tensors": tensors,
            "mesh": _mesh(header.mesh),
            "buckets": _buckets(header.buckets),
            "semantics": Semantics(
                temperature=semantics.temperature,
                head_dtype=semantics.head_dtype,
                first_token=name_of(pb.FirstToken, semantics.first_token),
                logit_scale=name_of(pb.LogitScale, semantics.logit_scale),
                segments=name_of(pb.SegmentMode, semantics.segments),
            ),
            "times": Times(**{f.name: _seconds(header, f"{f.name}_time") for f in fields(Times)}),
        }
    )


def _mesh(axes: Iterable[pb.MeshAxis]) -> dict[str, int]:
    return {axis.name: axis.size for axis in axes}


def _buckets(buckets: Iterable[pb.Bucket]) -> tuple[tuple[int, int], ...]:
    return tuple((bucket.rows, bucket.length) for bucket in buckets)


def _budget(message: pb.BudgetEstimate) -> BudgetEstimate:
    return BudgetEstimate(
        needed_bytes=message.needed_bytes,
        free_bytes=message.free_bytes,
        fits=message.fits,
        evicted=tuple(message.evicted),
    )


def _tokenizer(message: pb.TokenizerFacts) -> Tokenizer:
    return Tokenizer(
        files=tuple(message.files),
        bos_id=message.bos_id if message.HasField("bos_id") else None,
        eos_ids=tuple(message.eos_ids),
        pad_id=message.pad_id if message.HasField("pad_id") else None,
        has_chat_template=message.has_chat_template,
    )


def _config(message: pb.ConfigSummary) -> Config:
    return Config(**_shared(Config, message))


def _shared(kind: Any, message: Message) -> dict[str, Any]:
    names = message.DESCRIPTOR.fields_by_name
    return {f.name: getattr(message, f.name) for f in fields(kind) if f.name in names}


def _seconds(message: Any, field: str) -> float:
    return float(getattr(message, field).ToNanoseconds() / 1e9)


def _time(message: Any, field: str) -> datetime | None:
    return getattr(message, field).ToDatetime(tzinfo=UTC) if message.HasField(field) else None
