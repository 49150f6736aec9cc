"""Every setting of `moorage serve`: in a TOML file, and as a flag of the same name, which wins."""

# ruff: noqa: RUF009 (a setting is a field with more metadata)
from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moorage_models.ring import WINDOW_BYTES
from moorage_models.sources import ModelRequest
from moorage_models.sources.source import cache_folder
from moorage_server import parsing
from moorage_server.engine.local import DEVICE_FRACTION
from moorage_server.engine.outputs import OUTPUTS, PROFILES, Profile
from moorage_server.limits import Limits
from moorage_server.scheduler import QUEUE_TOKENS

_LIMITS = Limits()


@dataclass(frozen=True)
class _Setting:
    """How one setting is written, read and told of."""

    section: str
    parse: Callable[[Any], Any]
    default: str | bool | Sequence[str]
    metavar: str
    text: str

    @property
    def is_switch(self) -> bool:
        return isinstance(self.default, bool)

    @property
    def is_list(self) -> bool:
        return not isinstance(self.default, str | bool)


def _setting(
    section: str,
    parse: Callable[[Any], Any],
    default: str | bool | Sequence[str],
    metavar: str,
    text: str,
) -> Any:
    """A field: its value if nothing is said, and how it is read."""
    setting = _Setting(section, parse, default, metavar, text)
    return dataclasses.field(
        default_factory=lambda: _value(setting, default), metadata={"setting": setting}
    )


def _value(setting: _Setting, given: Any) -> Any:
    if setting.is_switch:
        return parsing.switch(given)
    if setting.is_list:
        return tuple(setting.parse(item) for item in parsing.array(given))
    return setting.parse(given)


@dataclass(frozen=True)
class Settings:
    """What the server is told; each field's metadata says what it means."""

    listen: str = _setting(
        "Network", parsing.address, "127.0.0.1:8470", "HOST:PORT", "address and port"
    )
    tls_cert: Path | None = _setting(
        "Network",
        parsing.file,
        "",
        "FILE",
        "the server's certificates, PEM; read again when it changes",
    )
    tls_key: Path | None = _setting(
        "Network", parsing.file, "", "FILE", "the key of the first of them, PEM"
    )
    tls_client_ca: Path | None = _setting(
        "Network",
        parsing.file,
        "",
        "FILE",
        "who signs clients' certificates, PEM: no others may connect",
    )
    tokens: Path | None = _setting(
        "Network",
        parsing.file,
        "",
        "FILE",
        "the tokens that calls may carry, one a line: a name, a role (score, load or admin) and "
        "the token; read again when it changes; without it every caller may do everything",
    )
    insecure: bool = _setting(
        "Network", bool, False, "", "listen beyond loopback with neither TLS nor tokens"
    )
    health_listen: str = _setting(
        "Network",
        parsing.address_or_none,
        "",
        "HOST:PORT",
        "also answer health checks here, in plain text, and nothing else",
    )
    status_listen: str = _setting(
        "Network",
        parsing.address_or_none,
        "",
        "HOST:PORT",
        "serve the status page and /metrics here, by HTTP, with the same certificates and tokens",
    )
    mesh: Mapping[str, int] = _setting(
        "Models",
        parsing.mesh,
        "",
        "AXES",
        "sizes of the axes, as fsdp=2,tp=4; if left out, all devices on tp",
    )
    root: tuple[Path, ...] = _setting(
        "Models", parsing.folder, (), "DIR", "a directory that models may be loaded from"
    )
    allow: tuple[str, ...] = _setting(
        "Models",
        str,
        (),
        "PATTERN",
        "what may be loaded from hubs and buckets, as huggingface:google/*, "
        "kaggle:google/gemma/* or gcs:bucket/models/*; if left out, anything",
    )
    preload: tuple[ModelRequest, ...] = _setting(
        "Models",
        parsing.model,
        (),
        "MODEL",
        "a model to load before the server is ready: an id, and if need be more of a ModelSpec's "
        "fields, as google/gemma-2-2b-it,dtype=bfloat16; in a file also as a table of them",
    )
    buckets: tuple[tuple[int, int], ...] = _setting(
        "Models",
        parsing.buckets,
        "1x128,8x128,1x512,8x512,1x2048,1x8192",
        "SHAPES",
        "shapes to compile for every model: rows for each data-parallel device x length",
    )
    outputs: tuple[Profile, ...] = _setting(
        "Models",
        lambda text: parsing.profiles(text, OUTPUTS, PROFILES),
        ",".join(OUTPUTS),
        "NAMES",
        "outputs to serve: no programs are compiled for others",
    )
    stream: bool = _setting(
        "Models",
        bool,
        False,
        "",
        "bring safetensors from hubs to the devices without a copy on this machine; they are not "
        "compared with the hubs' digests then",
    )
    verify: bool = _setting(
        "Models",
        bool,
        False,
        "",
        "read every byte of a model's files before they are loaded: compare what hubs state with "
        "what the disk has, and tell directories by their content",
    )
    device_memory: float = _setting(
        "Memory",
        parsing.memory,
        str(DEVICE_FRACTION),
        "AMOUNT",
        "what models may take of each device: a fraction of its memory, as 0.9, or an amount, as "
        "12GiB; CPU devices share the host's memory",
    )
    window: int = _setting(
        "Memory",
        parsing.window,
        str(WINDOW_BYTES >> 20),
        "MIB",
        "host memory that a load may take beyond the model, in MiB",
    )
    queue_tokens: int = _setting(
        "Limits",
        parsing.count,
        str(QUEUE_TOKENS),
        "N",
        "how many tokens may wait for the devices, padding included",
    )
    max_client_tokens: int = _setting(
        "Limits",
        parsing.count,
        str(_LIMITS.client_tokens),
        "N",
        "how many of them may be one client's",
    )
    max_requests: int = _setting(
        "Limits",
        parsing.count,
        str(_LIMITS.requests),
        "N",
        "how many requests may be under way at once",
    )
    max_client_requests: int = _setting(
        "Limits",
        parsing.count,
        str(_LIMITS.client_requests),
        "N",
        "how many of them may be one client's",
    )
    max_connections: int = _setting(
        "Limits",
        parsing.count,
        str(_LIMITS.connections),
        "N",
        "how many connections may be open at once; more are closed as they come",
    )
    max_models: int = _setting(
        "Limits",
        parsing.count,
        str(_LIMITS.models),
        "N",
        "how many models may be loaded or on their way",
    )
    max_client_models: int = _setting(
        "Limits",
        parsing.count,
        str(_LIMITS.client_models),
        "N",
        "how many of them one client may have asked for first, and be looking for at once",
    )
    max_leases: int = _setting(
        "Limits", parsing.count, str(_LIMITS.leases), "N", "how many leases there may be"
    )
    max_client_leases: int = _setting(
        "Limits",
        parsing.count,
        str(_LIMITS.client_leases),
        "N",
        "how many of them may be one client's",
    )
    state: Path | None = _setting(
        "Operation",
        parsing.path,
        "",
        "DIR",
        "where a journal is kept of what is loaded and leased",
    )
    restore: bool = _setting(
        "Operation",
        bool,
        False,
        "",
        "load again what the journal in `state` says was loaded; leases and handles hold",
    )
    compile_cache: Path = _setting(
        "Operation",
        lambda given: parsing.path(given) or cache_folder() / "compiled",
        "",
        "DIR",
        "where compiled programs are kept; if left out, `compiled` in MOORAGE_CACHE, or else in "
        "~/.cache/moorage",
    )
    drain_seconds: float = _setting(
        "Operation",
        parsing.seconds,
        "30",
        "SECONDS",
        "how long requests that were taken may take after SIGTERM",
    )
    log_level: str = _setting(
        "Operation",
        lambda text: parsing.choice(text, "debug", "info", "warning", "error"),
        "info",
        "LEVEL",
        "how much is logged: debug, info, warning or error",
    )
    log_format: str = _setting(
        "Operation",
        lambda text: parsing.choice(text, "text", "json"),
        "text",
        "FORMAT",
        "how: text, or json for one object a line",
    )

    @property
    def limits(self) -> Limits:
        """What clients may have."""
        names = {field.name for field in dataclasses.fields(Limits)}
        return Limits(**{name: getattr(self, f"max_{name}") for name in names})


SETTINGS: Mapping[str, _Setting] = {
    field.name: field.metadata["setting"] for field in dataclasses.fields(Settings)
}
"""Every setting by its name, in the order of the documentation."""


def parser() -> argparse.ArgumentParser:
    """The flags: each setting, and what is done with them."""
    found = argparse.ArgumentParser(
        prog="moorage serve", description="Runs the moorage server.", allow_abbrev=False
    )
    found.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file of the settings below"
    )
    found.add_argument(
        "--validate", action="store_true", help="check the settings, say what is wrong, and end"
    )
    for name, setting in SETTINGS.items():
        _add_flag(found, "--" + name.replace("_", "-"), setting)
    return found


def _add_flag(found: argparse.ArgumentParser, flag: str, setting: _Setting) -> None:
    text, default = setting.text.replace("%", "%%"), argparse.SUPPRESS
    if setting.is_switch:
        found.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
    elif setting.is_list:
        found.add_argument(
            flag,
            action="append",
            default=default,
            metavar=setting.metavar,
            help=f"{text}; may be repeated",
        )
    else:
        shown = f"; default: {setting.default}" if setting.default else ""
        found.add_argument(flag, default=default, metavar=setting.metavar, help=text + shown)


def read(arguments: argparse.Namespace) -> Settings:
    """The settings of a file and of flags, which win.

    Args:
        arguments: What `parser` made of the flags.

    Raises:
        ValueError: What is wrong, one thing a line.
    """
    flags = {name: value for name, value in vars(arguments).items() if name in SETTINGS}
    written = _written(arguments.config) if arguments.config else {}
    problems, values = list(_unknown(written)), {}
    for name, given in (written | flags).items():
        if name in SETTINGS:
            where = f"--{name.replace('_', '-')}" if name in flags else name
            try:
                values[name] = _value(SETTINGS[name], given)
            except ValueError as error:
                problems.append(f"{where} {given!r}: {error}")
    settings = Settings(**values)
    if problems := problems or list(_contradictions(settings)):
        raise ValueError("\n".join(problems))
    return settings


def _written(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config {file}: {error}") from error


def _unknown(written: Mapping[str, Any]) -> Iterator[str]:
    for name in written.keys() - SETTINGS.keys():
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"there is no setting {name!r}{hint}"


def _contradictions(settings: Settings) -> Iterator[str]:
    """What does not go together."""
    if settings.verify and settings.stream:
        yield "verify reads what is on the disk, stream leaves none: choose one"
    if settings.restore and settings.state is None:
        yield "restore needs state, where the journal is"
    if (settings.tls_cert is None) != (settings.tls_key is None):
        yield "tls_cert and tls_key belong together: give both"
    if settings.tls_client_ca and settings.tls_cert is None:
        yield "tls_client_ca needs tls_cert and tls_key: clients' certificates come by TLS"
    for name, other in itertools.combinations(("listen", "health_listen", "status_listen"), 2):
        where = getattr(settings, name)
        if where and where == getattr(settings, other) and not where.endswith(":0"):
            yield f"{name} and {other} are both {where!r}: give each its own"
    for name in ("listen", "status_listen"):
        where = getattr(settings, name)
        if where and not (parsing.is_local(where) or _is_guarded(settings) or settings.insecure):
            yield (
                f"{name} {where!r} is beyond loopback, with neither TLS nor tokens: anyone could "
                "load and unload. Give tls_cert and tls_key, or tokens, or say insecure"
            )


def _is_guarded(settings: Settings) -> bool:
    return bool(settings.tls_cert or settings.tokens)


def table() -> str:
    """Every setting in Markdown, for the documentation."""
    lines = []
    for section in dict.fromkeys(setting.section for setting in SETTINGS.values()):
        lines += [f"### {section}", "", "| setting | default | what |", "| --- | --- | --- |"]
        for name, setting in SETTINGS.items():
            if setting.section == section:
                kind = "list" if setting.is_list else _shown(setting.default)
                lines.append(f"| `{name}` | {kind} | {setting.text} |")
        lines.append("")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    return f"`{str(default).lower()}`" if isinstance(default, bool) or default else ""
