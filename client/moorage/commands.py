"""The client commands of the command line: each asks the server and says what to print."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from moorage import score_table
from moorage.answers import Model
from moorage.client import Client
from moorage.descriptions import activity, ago, limits, model_columns
from moorage.errors import InvalidRequest, NotFound
from moorage.naming import BudgetEstimate, Config, Resolution
from moorage.render import count, duration, pairs, size, table
from moorage.scores import Scores
from moorage.server_info import OutputProfile
from moorage.tokens import encode


@dataclass(frozen=True)
class Output:
    """What a command prints, and its exit code.

    Attributes:
        data: What --json prints.
        text: What is printed without --json.
        code: 0, or 1 if the answer is no.
    """

    data: object
    text: str
    code: int = 0


def resolve(client: Client, arguments: Namespace) -> Output:
    """Says what a name means; exits with 1 if the model cannot be loaded."""
    found = client.resolve(
        arguments.id,
        arguments.source,
        arguments.path,
        arguments.revision,
        estimate=arguments.estimate,
    )
    return Output(found, _resolution(found), 0 if found.loadable else 1)


def load(client: Client, arguments: Namespace) -> Output:
    """Loads a model and describes it."""
    model = client.load(
        arguments.id,
        arguments.source,
        model_path=arguments.path,
        revision=arguments.revision,
        dtype=arguments.dtype,
        compute_dtype=arguments.compute_dtype,
        options=dict(arguments.option),
    )
    facts = {
        "handle": model.handle,
        "model id": model.model_id,
        "path": model.path,
        "revision": model.revision,
        "config": _config(model.config),
        "dtype": f"{model.dtype}, computes in {model.compute_dtype}",
        "device memory": _memory(model.device_bytes),
        "loaded in": duration(model.load_seconds),
        "differs from preset": "; ".join(model.preset_differences),
    }
    return Output(model, pairs(facts))


def ps(client: Client, arguments: Namespace) -> Output:
    """Lists the models; with --watch, shows the server until it is interrupted."""
    if arguments.watch:
        from moorage import watching  # only who watches pays for the import

        watching.watch(client, as_json=arguments.json)
    models = client.models()
    columns = model_columns(models, datetime.now(UTC))
    width = shutil.get_terminal_size((100, 24)).columns
    return Output(models, table(columns, width, ("MODEL", "LEASES")))


def forward(client: Client, arguments: Namespace) -> Output:
    """Scores rows."""
    model = _find(client, arguments.model)
    if arguments.text is None:
        rows, tokens = arguments.ids, None
    else:
        rows, tokens = encode(arguments.text, model.model_id, arguments.tokenizer)
    scores = model.forward(
        rows,
        arguments.outputs,
        top_k=arguments.top_k,
        temperature=arguments.temperature,
        from_position=arguments.from_position,
    )
    text = score_table.text(rows, tokens, scores, arguments.from_position)
    return Output({"rows": rows, "tokens": tokens, "scores": scores}, text)


def unload(client: Client, arguments: Namespace) -> Output:
    """Frees a model."""
    model = _find(client, arguments.model)
    freed = client.unload(model, force=arguments.force)
    text = f"{model.model_id} ({model.handle}) is unloaded; freed {_memory(freed) or size(0)}"
    return Output({"handle": model.handle, "device_bytes": freed}, text)


def status(client: Client, _: Namespace) -> Output:
    """Describes the server."""
    info = client.info()
    facts = {
        "server": client.address,
        "version": info.version,
        "platform": info.platform,
        "up for": ago(info.start_time, datetime.now(UTC)),
        "mesh": ", ".join(f"{axis}={length}" for axis, length in info.mesh.items()),
        "buckets": ", ".join(f"{rows}x{length}" for rows, length in info.buckets),
        "outputs": ", ".join(info.outputs),
        "programs": ", ".join(map(_profile, info.profiles)),
        "sources": ", ".join(info.sources),
        "longest row": f"{info.max_sequence_length} tokens",
        "largest request": size(info.max_message_bytes),
        "largest answer": size(info.max_output_bytes),
        "may wait": f"{count(info.max_queued_tokens)} tokens",
        "answers are kept": f"for {duration(info.answer_retention_seconds)}, "
        f"{size(info.max_retained_bytes)} at most",
        "models may take": f"{size(info.memory.budget_bytes)} of each device",
        "reserved": f"{size(info.memory.reserved_bytes)} of each device",
        "host memory kept": size(info.memory.host_pool_bytes),
        **limits(info),
        **activity(info),
    }
    columns: dict[str, Sequence[object]] = {
        "DEVICE": [device.id for device in info.devices],
        "KIND": [device.kind for device in info.devices],
        "MODELS": [size(device.model_bytes) for device in info.devices],
        "ARRAYS": [size(info.memory.live_bytes.get(device.id, 0)) for device in info.devices],
    }
    return Output(info, f"{pairs(facts)}\n\n{table(columns)}")


def _find(client: Client, name: str) -> Model[Scores]:
    models = client.models()
    found = [m for m in models if name == m.handle] or [m for m in models if name == m.model_id]
    if not found:
        known = ", ".join(f"{m.handle} ({m.model_id})" for m in models) or "none"
        raise NotFound(f"no loaded model has the handle or id {name!r}; loaded: {known}")
    if len(found) > 1:
        handles = ", ".join(m.handle for m in found)
        raise InvalidRequest(f"several loaded models have the id {name!r}; name one of {handles}")
    return found[0]


def _resolution(found: Resolution) -> str:
    return pairs(
        {
            "model id": found.model_id,
            "name": found.model_name,
            "family": found.model_family,
            "version": found.model_version,
            "category": found.model_config_category,
            "config id": found.model_config_id,
            "config": _config(found.config),
            "revision": found.revision,
            "checked": ", ".join(found.checked),
            "loadable": "yes" if found.loadable else "no",
            "reason": found.reason,
            "message": found.message,
            "device memory": _memory(found.device_bytes),
            **(_budget(found.budget) if found.budget else {}),
            "differs from preset": "; ".join(found.preset_differences),
        }
    )


def _budget(budget: BudgetEstimate) -> dict[str, str]:
    evicting = f", after evicting {', '.join(budget.evicted)}" if budget.evicted else ""
    return {
        "needed": f"{size(budget.needed_bytes)} on each device",
        "free": f"{size(budget.free_bytes)} on each device",
        "fits": f"yes{evicting}" if budget.fits else "no",
    }


def _profile(profile: OutputProfile) -> str:
    size = f" of {profile.size}" if profile.size else ""
    return f"{'+'.join(profile.outputs)}{size}"


def _config(config: Config | None) -> str:
    if config is None:
        return ""
    return f"{config.family}, {config.num_layers} layers, {config.num_parameters:,} parameters"


def _memory(device_bytes: Mapping[int, int]) -> str:
    if not device_bytes:
        return ""
    total, most = sum(device_bytes.values()), max(device_bytes.values())
    if len(device_bytes) == 1:
        return f"{size(total)} on one device"
    return f"{size(total)} on {len(device_bytes)} devices, at most {size(most)} on one"
