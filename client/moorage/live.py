"""What `moorage ps --watch` shows of a server: the numbers of `ps` and `status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rich.console import Group
from rich.text import Text

from moorage.answers import UNITS, Model, Stage
from moorage.descriptions import activity, ago, model_columns
from moorage.render import cells, duration, pairs, size, sizes
from moorage.scores import Scores
from moorage.server_info import ServerInfo

_QUIET = 3.0  # seconds after which it is said that there is no answer
_FEWEST = 4  # lines of the table of models, however low the terminal
_ERRORS = 5  # that are shown
_DEVICE_WIDTH = 28  # at the least
_STAGE_COLUMNS = ("STAGE", "BAR", "DONE", "RATE", "LEFT")
_SHADES = ("█", "▒")
_FREE = "░"
_STYLES = {
    "queued": "yellow",
    "resolving": "yellow",
    "loading": "yellow",
    "ready": "green",
    "draining": "magenta",
}
_SHOWN_FROM = {
    "HANDLE": 72,
    "USED": 80,
    "LEASES": 94,
    "DTYPE": 108,
    "FWDS": 108,
    "METHOD": 76,
    "CLIENT": 120,
}
"""Columns, and how wide a terminal must be to have them; all others are always there."""


@dataclass(frozen=True)
class Snapshot:
    """How a server was at one moment.

    Attributes:
        server: Its address.
        info: What it said of itself.
        models: Its models.
        error: Why it does not answer since then, or "".
        time: The moment.
    """

    server: str
    info: ServerInfo
    models: tuple[Model[Scores], ...]
    error: str = ""
    time: datetime = field(default_factory=lambda: datetime.now(UTC), compare=False)


def picture(seen: Snapshot, width: int, now: datetime, height: int = 0) -> Group:
    """Draws how a server is.

    Args:
        seen: How it is.
        width: Characters of a line.
        now: The moment of drawing.
        height: How many lines there may be; the table of models becomes shorter where there are
            too many. 0 for any number.

    Returns:
        Lines for `rich`.
    """
    above = [_header(seen, now), _memory(seen.info, width)]
    below = [_activity(seen.info), _errors(seen.info, width, now)]
    models = _models(seen.models, width, now)
    if height:
        room = height - sum(len(lines) + 1 for lines in (*above, *below) if lines)
        models = _shortened(models, max(room, _FEWEST))
    sections = [*above, models, *below]
    lines = [line for section in sections if section for line in (Text(), *section)]
    return Group(*lines[1:])


def _header(seen: Snapshot, now: datetime) -> list[Text]:
    info = seen.info
    mesh = " ".join(f"{axis}={length}" for axis, length in info.mesh.items())
    uptime = f"up {ago(info.start_time, now)}"
    facts = (seen.server, f"v{info.version}", info.platform, mesh, uptime)
    lines = [_line("  ".join(facts), "bold")]
    quiet = (now - seen.time).total_seconds()
    if seen.error or quiet > _QUIET:
        text = f"no answer for {duration(quiet, units=1)}; waiting for the server"
        lines.append(_line(text, "bold red"))
    return lines


def _memory(info: ServerInfo, width: int) -> list[Text]:
    memory, full = info.memory, max(info.memory.budget_bytes, 1)
    arrays, reserved = _SHADES
    legend = (
        f"{arrays} arrays  {reserved} reserved {size(memory.reserved_bytes)}  "
        f"{_FREE} of {size(memory.budget_bytes)} on each device"
    )
    in_line = min(max(width // _DEVICE_WIDTH, 1), max(len(info.devices), 1))
    bar_width = min(width // in_line, 2 * _DEVICE_WIDTH) - 16
    bars = []
    for device in info.devices:
        live = memory.live_bytes.get(device.id, 0)
        bar = _bar(bar_width, live / full, memory.reserved_bytes / full)
        bars.append(f"{device.id:3} {bar} {size(live):10}")
    lines = ["".join(bars[i : i + in_line]) for i in range(0, len(bars), in_line)]
    return [_line(legend, "dim"), *(_line(line, "cyan") for line in lines)]


def _models(models: Sequence[Model[Scores]], width: int, now: datetime) -> list[Text]:
    columns = _shown(model_columns(models, now), width)
    elastic = [title for title in ("MODEL", "LEASES") if title in columns]
    titles, *rows = ("  ".join(row) for row in cells(columns, width, elastic))
    lines, state = [_line(titles, "bold")], titles.index("STATE")
    for model, row in zip(models, rows, strict=True):
        line = _line(row)
        line.stylize(_STYLES.get(model.state, ""), state, state + len(model.state))
        lines += [line, *_stages(model, width)]
    return lines


def _stages(model: Model[Scores], width: int) -> list[Text]:
    stages = model.progress.stages if model.progress else {}
    if not stages:
        return []
    bar_width = min(max(width - 52, 8), 40)
    described = [_stage(name, stage, bar_width) for name, stage in stages.items()]
    columns: dict[str, Sequence[object]] = dict(
        zip(_STAGE_COLUMNS, zip(*described, strict=True), strict=True)
    )
    return [_line("  " + "  ".join(row), "yellow") for row in cells(columns)[1:]]


def _stage(name: str, stage: Stage, bar_width: int) -> tuple[str, ...]:
    left = stage.seconds_left
    if unit := UNITS.get(name):
        amount, rate = f"{stage.done}/{stage.total} {unit}", f"{stage.rate:.1f}/s"
    else:
        amount = sizes(stage.done, stage.total) if stage.total else size(stage.done)
        rate = f"{size(int(stage.rate))}/s"
    bar = _bar(bar_width, stage.done / stage.total if stage.total else 0.0)
    return name, bar, amount, rate, f"{duration(left, units=1)} left" if left else ""


def _activity(info: ServerInfo) -> list[Text]:
    return [_line(line) for line in pairs(activity(info)).splitlines()]


def _errors(info: ServerInfo, width: int, now: datetime) -> list[Text]:
    errors = info.activity.errors[: -_ERRORS - 1 : -1]
    columns = _shown(
        {
            "AGO": [ago(error.time, now, units=1) for error in errors],
            "METHOD": [error.method for error in errors],
            "REASON": [error.reason for error in errors],
            "CLIENT": [error.client for error in errors],
            "MESSAGE": [error.message for error in errors],
        },
        width,
    )
    titles, *rows = cells(columns)
    lines = [_line("  ".join(titles), "bold"), *(_line("  ".join(row), "red") for row in rows)]
    return lines if errors else []


def _shown(columns: Mapping[str, Sequence[object]], width: int) -> dict[str, Sequence[object]]:
    return {title: c for title, c in columns.items() if width >= _SHOWN_FROM.get(title, 0)}


def _shortened(lines: list[Text], most: int) -> list[Text]:
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], _line(f"and {len(lines) - most + 1} lines more", "dim")]


def _bar(width: int, *shares: float) -> str:
    text = ""
    for shade, share in zip(_SHADES, shares, strict=False):
        text += shade * (round(min(share, 1.0) * width) - len(text))
    return text + _FREE * (width - len(text))


def _line(text: str, style: str = "") -> Text:
    return Text(text.rstrip(), style, no_wrap=True, overflow="ellipsis")
