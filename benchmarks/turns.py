"""Runs that take turns, and what their seconds say: figures of one run, against what is wanted."""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

HEADER = "| figure | median | spread | target | met |\n| --- | --- | --- | --- | --- |"

#: Does something once and says how many seconds it took.
Run = Callable[[], float]

_HOLDS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Figure:
    """A line of the table.

    Attributes:
        name: What it is.
        values: One of each round; the median counts.
        target: The sign and the number that are wanted, as `>= 0.9`; empty for none.
    """

    name: str
    values: Sequence[float]
    target: str = ""

    def __str__(self) -> str:
        median, met = statistics.median(self.values), ""
        if self.target:
            sign, number = self.target.split()
            met = "yes" if _HOLDS[sign](median, float(number)) else "no"
        spread = f"{min(self.values):.2f} .. {max(self.values):.2f}"
        return f"| {self.name} | {median:.2f} | {spread} | {self.target} | {met} |"


def show(name: str, values: Sequence[float], target: str = "") -> None:
    """Prints a figure at once."""
    print(Figure(name, values, target), flush=True)


def timed(run: Callable[[], object]) -> Run:
    """Measures from outside what cannot say how long it took."""

    def seconds() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return seconds


def take_turns(
    runs: Mapping[str, Run], rounds: int, budget: float = math.inf, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of every run in every round.

    Args:
        runs: By name.
        rounds: At the most.
        budget: Seconds; once they are spent no further round begins.
        warm: Whether all were run before; else each is, once, and that is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values() if not warm else ():
        run()
    begin = time.monotonic()
    for done in range(rounds):
        if done and time.monotonic() - begin > budget:
            break
        for name, run in runs.items():
            taken[name].append(run())
    return taken


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """One by the other, round by round."""
    return [a / b for a, b in zip(one, other, strict=True)]
