"""Models and servers in words and figures: what `ps`, `status` and the live view say alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from moorage.answers import Lease, Model
from moorage.progress import placed
from moorage.render import count, duration, sizes
from moorage.scores import Scores
from moorage.server_info import ServerInfo

_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def model_columns(models: Sequence[Model[Scores]], now: datetime) -> dict[str, Sequence[object]]:
    """Gives what there is to say of models: a column for each matter, by title."""
    return {
        "HANDLE": [m.handle for m in models],
        "MODEL": [m.model_id for m in models],
        "STATE": [_state(m) for m in models],
        "DTYPE": [_DTYPES.get(m.dtype, m.dtype) for m in models],
        "EACH/ALL": [_each_and_all(m.device_bytes) for m in models],
        "LEASES": [_leases(m.leases) for m in models],
        "USED": [ago(m.last_use_time, now, units=1) for m in models],
        "RUN": [m.running_count for m in models],
        "FWDS": [count(m.forward_count) for m in models],
        "TOKENS": [count(m.token_count) for m in models],
    }


def activity(info: ServerInfo) -> dict[str, str]:
    """Gives what a server does and has done, by matter; "" where there is nothing to say."""
    done, limits = info.activity, info.limits
    full = done.batch_tokens / max(done.batch_slots, 1)
    return {
        "under way": f"{done.requests} of {limits.requests} requests, "
        f"{done.forwards_under_way} of them forward passes",
        "queued": f"{count(done.queued_tokens)} of {count(info.max_queued_tokens)} tokens",
        "leases": f"{done.leases} of {limits.leases}",
        "answered": f"{count(done.forwards)} forward passes, {count(done.tokens)} tokens",
        "batches": f"{count(done.batches)}, {full:.0%} full" if done.batches else "",
        "loads": _counts(done.loads),
        "refused": _counts(done.refusals),
    }


def limits(info: ServerInfo) -> dict[str, str]:
    """Gives how much clients may have, all together and each."""
    most = info.limits
    return {
        "clients may have": f"{most.requests} requests, {most.connections} connections, "
        f"{most.models} models, {most.leases} leases",
        "one may have": f"{most.client_requests} requests, {count(most.client_tokens)} tokens "
        f"waiting, {most.client_models} models, {most.client_leases} leases",
    }


def ago(time: datetime | None, now: datetime, units: int = 2) -> str:
    """Writes how long ago something was, as `render.duration`; - for what never was."""
    return duration(max((now - time).total_seconds(), 0.0), units) if time else "-"


def _state(model: Model[Scores]) -> str:
    done, total = placed(model.progress) if model.progress else (0, 0)
    return f"{model.state} {done / total:.0%}" if total else model.state


def _each_and_all(device_bytes: Mapping[int, int]) -> str:
    amounts = device_bytes.values()
    return sizes(max(amounts), sum(amounts)) if amounts else "-"


def _leases(leases: Sequence[Lease]) -> str:
    if len(leases) == 1:
        return f"{leases[0].client} {duration(leases[0].seconds_left, units=1)}"
    return str(len(leases) or "-")


def _counts(counts: Mapping[str, int]) -> str:
    often = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count(number)} {name}" for name, number in often)
