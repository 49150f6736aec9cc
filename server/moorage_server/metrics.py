"""Metrics for Prometheus: what ServerService says, in the same numbers, and the histograms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moorage.v1 import moorage_pb2 as pb
from moorage_server.histograms import MEASURES, Histograms
from moorage_server.lifecycle import State
from moorage_server.server_service import ServerService

Samples: TypeAlias = Iterable[tuple[tuple[str, ...], float]]

_STATES = (State.QUEUED, State.LOADING, State.READY, State.DRAINING)  # of models that are listed
_MODEL = ("handle", "model")


@dataclass(frozen=True)
class Seen:
    """What the server says of itself at one moment."""

    info: pb.GetServerInfoResponse
    models: list[pb.Model]

    @property
    def memory(self) -> pb.Memory:
        """What is promised and held."""
        return self.info.memory

    @property
    def activity(self) -> pb.Activity:
        """What goes on, and has gone on."""
        return self.info.activity


@dataclass(frozen=True)
class _Kind:
    """A metric: its type, what it means, its labels, and its values."""

    family: type[CounterMetricFamily] | type[GaugeMetricFamily]
    text: str
    labels: tuple[str, ...]
    samples: Callable[[Seen], Samples]

    @property
    def type(self) -> str:
        return "counter" if self.family is CounterMetricFamily else "gauge"


def _gauge(text: str, value: Callable[[Seen], float]) -> _Kind:
    return _Kind(GaugeMetricFamily, text, (), lambda seen: [((), value(seen))])


def _counter(text: str, value: Callable[[Seen], float]) -> _Kind:
    return _Kind(CounterMetricFamily, text, (), lambda seen: [((), value(seen))])


def _by_model(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    text: str,
    value: Callable[[pb.Model], float],
) -> _Kind:
    return _Kind(family, text, _MODEL, lambda seen: ((_names(m), value(m)) for m in seen.models))


def _names(model: pb.Model) -> tuple[str, str]:
    return model.handle, model.spec.model_id


def _states(seen: Seen) -> Samples:
    count = Counter(pb.ModelState.Name(m.state).removeprefix("MODEL_STATE_") for m in seen.models)
    return (((state.value,), count[state.value]) for state in _STATES)


def _counts(counts: Iterable[pb.Count]) -> Samples:
    return (((count.name,), count.count) for count in counts)


def _by_device(amounts: Iterable[pb.DeviceBytes]) -> Samples:
    return (((str(amount.device_id),), amount.bytes) for amount in amounts)


def _model_bytes(seen: Seen) -> Samples:
    for model in seen.models:
        for (device,), count in _by_device(model.device_bytes):
            yield (*_names(model), device), count


def _limits(seen: Seen) -> Samples:
    for field, value in seen.info.limits.ListFields():
        if field.name.startswith("max_"):
            yield (field.name.removeprefix("max_"),), value


#: Every metric by its name, but for the histograms.
KINDS: Mapping[str, _Kind] = {
    "moorage_build_info": _Kind(
        GaugeMetricFamily,
        "1, with the server's version and its platform",
        ("version", "platform"),
        lambda seen: [((seen.info.version, seen.info.platform), 1)],
    ),
    "moorage_start_time_seconds": _gauge(
        "When the server started, in seconds since the epoch",
        lambda seen: seen.info.start_time.ToNanoseconds() / 1e9,
    ),
    "moorage_models": _Kind(
        GaugeMetricFamily, "Models that are loaded or on their way, by state", ("state",), _states
    ),
    "moorage_loads_total": _Kind(
        CounterMetricFamily,
        "Loads that are over, by the state that they ended in, or the reason of a failure",
        ("outcome",),
        lambda seen: _counts(seen.activity.loads),
    ),
    "moorage_model_bytes": _Kind(
        GaugeMetricFamily,
        "Bytes of parameters of each model on each device",
        (*_MODEL, "device"),
        _model_bytes,
    ),
    "moorage_model_reserved_bytes": _by_model(
        GaugeMetricFamily,
        "Bytes reserved for each model on each device: parameters, and its largest program",
        lambda model: model.reserved_bytes,
    ),
    "moorage_model_running": _by_model(
        GaugeMetricFamily,
        "Forward passes of each model that run or wait",
        lambda model: model.running_count,
    ),
    "moorage_model_leases": _by_model(
        GaugeMetricFamily, "Leases on each model", lambda model: len(model.leases)
    ),
    "moorage_model_forwards_total": _by_model(
        CounterMetricFamily,
        "Forward passes answered by each model",
        lambda model: model.forward_count,
    ),
    "moorage_model_tokens_total": _by_model(
        CounterMetricFamily, "Tokens of theirs", lambda model: model.token_count
    ),
    "moorage_device_budget_bytes": _gauge(
        "Bytes on each device that models may take", lambda seen: seen.memory.budget_bytes
    ),
    "moorage_device_reserved_bytes": _gauge(
        "Bytes on each device that are reserved for models",
        lambda seen: seen.memory.reserved_bytes,
    ),
    "moorage_device_live_bytes": _Kind(
        GaugeMetricFamily,
        "Bytes of arrays that are alive on a device, as the runtime counts them",
        ("device",),
        lambda seen: _by_device(seen.memory.live_bytes),
    ),
    "moorage_host_pool_bytes": _gauge(
        "Host memory that models have left behind, kept for those to come",
        lambda seen: seen.memory.host_pool_bytes,
    ),
    "moorage_requests": _gauge(
        "Requests of every kind that are under way", lambda seen: seen.activity.requests
    ),
    "moorage_forwards_under_way": _gauge(
        "Of these, forward passes that wait for their answers, or take them",
        lambda seen: seen.activity.forwards_under_way,
    ),
    "moorage_queued_tokens": _gauge(
        "Tokens that wait for the devices, padding included",
        lambda seen: seen.activity.queued_tokens,
    ),
    "moorage_leases": _gauge("Leases that have not ended", lambda seen: seen.activity.leases),
    "moorage_forwards_total": _counter(
        "Forward passes answered", lambda seen: seen.activity.forwards
    ),
    "moorage_tokens_total": _counter("Tokens of theirs", lambda seen: seen.activity.tokens),
    "moorage_batches_total": _counter("Batches that ran", lambda seen: seen.activity.batches),
    "moorage_batch_tokens_total": _counter(
        "Tokens in them, of rows that were asked for", lambda seen: seen.activity.batch_tokens
    ),
    "moorage_batch_slots_total": _counter(
        "Tokens in them, padding included", lambda seen: seen.activity.batch_slots
    ),
    "moorage_refusals_total": _Kind(
        CounterMetricFamily,
        "Requests that were refused or failed, by reason",
        ("reason",),
        lambda seen: _counts(seen.activity.refusals),
    ),
    "moorage_compiles_after_ready_total": _counter(
        "Programs that were compiled for a forward pass: a bug if there are any",
        lambda seen: seen.info.compiles_after_ready,
    ),
    "moorage_limit": _Kind(
        GaugeMetricFamily, "What there may be at the most, by its name", ("name",), _limits
    ),
}


class ServerCollector:
    """Asks the service that the rpc asks, so that both say the same; in the event loop only."""

    def __init__(self, about: ServerService) -> None:
        self._about = about

    def collect(self) -> Iterator[Metric]:
        """Every metric of `KINDS` as it is now."""
        seen = Seen(self._about.describe(), self._about.models())
        for name, kind in KINDS.items():
            family = kind.family(name, kind.text, labels=kind.labels)
            for labels, value in kind.samples(seen):
                family.add_metric(labels, value)
            yield family


def registry(about: ServerService, histograms: Histograms) -> CollectorRegistry:
    """A registry of one server's metrics, and of its process."""
    found = CollectorRegistry()
    found.register(ServerCollector(about))
    found.register(histograms)
    ProcessCollector(registry=found)
    return found


def table() -> str:
    """Every metric in Markdown, for the documentation."""
    rows = [(name, kind.type, kind.labels, kind.text) for name, kind in KINDS.items()]
    rows += [(name, "histogram", m.labels, m.text) for name, m in MEASURES.items()]
    lines = ["| metric | type | labels | what |", "| --- | --- | --- | --- |"]
    for name, type_, labels, text in rows:
        lines.append(f"| `{name}` | {type_} | {', '.join(f'`{x}`' for x in labels)} | {text} |")
    return "\n".join(lines)
