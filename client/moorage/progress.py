"""The progress bar of a load, drawn by tqdm on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moorage.answers import UNITS, LoadProgress

Callback = Callable[[LoadProgress], None]


@contextmanager
def shown(title: str, callback: Callback | None, bar: bool | None) -> Iterator[Callback]:
    """Shows a load while its block runs.

    Args:
        title: What is loaded.
        callback: Is called with each progress as well, if given.
        bar: Whether to draw a bar; None does so if stderr is a terminal.

    Yields:
        What to call with each progress.
    """
    quiet = callback or _ignore
    if bar is False or (bar is None and not sys.stderr.isatty()):
        yield quiet
        return
    from tqdm import tqdm  # only who looks at a bar pays for the import

    with tqdm(desc=title, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr) as line:

        def show(progress: LoadProgress) -> None:
            done, total = placed(progress)
            line.total = total or None
            line.n = done
            line.set_postfix_str(note(progress))
            quiet(progress)

        yield show


def placed(progress: LoadProgress) -> tuple[int, int]:
    """Gives the bytes placed in device memory and their total, 0 while that is unknown.

    Before anything is placed, those that are fetched.
    """
    stage = progress.stages.get("place") or progress.stages.get("fetch")
    return (stage.done, stage.total) if stage else (0, 0)


def note(progress: LoadProgress) -> str:
    """Says what placed bytes do not: the state, the fetch, programs, trials, who else waits."""
    fetched = progress.stages.get("fetch")
    parts = [progress.state]
    if fetched and fetched.done < fetched.total:
        parts.append(f"{fetched.done / fetched.total:.0%} fetched")
    for name, unit in UNITS.items():
        if (stage := progress.stages.get(name)) and stage.total:
            parts.append(f"{stage.done}/{stage.total} {unit}")
    if progress.waiters > 1:
        parts.append(f"{progress.waiters} waiting")
    return ", ".join(parts)


def _ignore(_: LoadProgress) -> None:
    pass
