"""From the messages of the wire to the dataclasses of `answers`; pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import Message

from moorage.answers import (
    BudgetEstimate,
    Config,
    Device,
    Lease,
    LoadProgress,
    Memory,
    Model,
    Resolution,
    Scorer,
    ServerInfo,
    Stage,
    SupportedModel,
    T_co,
    Tokenizer,
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
        state=_name(pb.ModelState, message.state),
        stages={
            stage.stage: Stage(stage.done, stage.total, stage.rate) for stage in message.stages
        },
        waiters=message.waiters,
        elapsed_seconds=message.elapsed.ToNanoseconds() / 1e9,
    )


def lease(message: pb.Lease) -> Lease:
    """Decodes a lease."""
    return Lease(
        id=message.id,
        client=message.client,
        seconds=message.duration.ToNanoseconds() / 1e9,
        seconds_left=message.time_left.ToNanoseconds() / 1e9,
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
        state=_name(pb.ModelState, message.state),
        model_id=message.spec.model_id,
        model_config_id=message.name.model_config_id,
        source=_name(pb.ModelSource, message.spec.source),
        path=message.path,
        revision=message.revision,
        config=_config(message.config),
        dtype=message.dtype,
        compute_dtype=message.compute_dtype,
        device_bytes=device_bytes(message.device_bytes),
        load_time=_time(message, "load_time"),
        load_seconds=message.load_duration.ToNanoseconds() / 1e9,
        last_use_time=_time(message, "last_use_time"),
        forward_count=message.forward_count,
        token_count=message.token_count,
        progress=load_progress(message.progress) if message.HasField("progress") else None,
        preset_differences=tuple(message.preset_differences),
        tokenizer=_tokenizer(message.tokenizer),
        leases=tuple(map(lease, message.leases)),
        history={
            _name(pb.ModelState, change.state): change.time.ToDatetime(tzinfo=UTC)
            for change in message.history
        },
        running_count=message.running_count,
        reserved_bytes=message.reserved_bytes,
        client=client,
    )


def device_bytes(messages: Iterable[pb.DeviceBytes]) -> dict[int, int]:
    """Decodes amounts of memory: bytes by device id."""
    return {message.device_id: message.bytes for message in messages}


def server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    """Decodes the answer of GetServerInfo."""
    return ServerInfo(
        version=message.version,
        platform=message.platform,
        devices=tuple(Device(d.id, d.kind, d.model_bytes) for d in message.devices),
        mesh={axis.name: axis.size for axis in message.mesh},
        buckets=tuple((bucket.rows, bucket.length) for bucket in message.buckets),
        **_shared(ServerInfo, message.limits),
        sources=tuple(_name(pb.ModelSource, source) for source in message.sources),
        outputs=tuple(message.outputs),
        start_time=_time(message, "start_time"),
        memory=Memory(
            budget_bytes=message.memory.budget_bytes,
            reserved_bytes=message.memory.reserved_bytes,
            live_bytes=device_bytes(message.memory.live_bytes),
            host_pool_bytes=message.memory.host_pool_bytes,
        ),
    )


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


def _name(enum: Any, number: int) -> str:
    """MODEL_STATE_READY is "ready"; a number of a newer server is itself."""
    value = enum.DESCRIPTOR.values_by_number.get(number)
    prefix = enum.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")
    return value.name.removeprefix(prefix).lower() if value else str(number)


def _time(message: Any, field: str) -> datetime | None:
    return getattr(message, field).ToDatetime(tzinfo=UTC) if message.HasField(field) else None
