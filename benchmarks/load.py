"""Loads against the limit of reading, and against other loaders: ratios of one run.

    make bench-load                                        ours, safetensors and Orbax
    make bench-load ARGS="--tunix-python T --torch-python P --scale 0.1"

Every load is in a process of its own (`load_peers.py`); the contestants take turns. Checkpoints
are made once (`load_checkpoints.py`). The table is Markdown; `--json` keeps what was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load_checkpoints import FOLDER, RECIPES, make

_SPARE_BYTES = 256 << 20
_DENSE, _EXPERTS, _GEMMA = RECIPES


@dataclass(frozen=True)
class Run:
    """What one process does.

    Attributes:
        contestant: As `load_peers.py` names it.
        checkpoint: Which one it loads.
        again: Loads after the first, into memory that the process has used before.
        cold: Whether these come from the disk.
        python: Whose interpreter it needs: ours, or the one of an option.
    """

    contestant: str
    checkpoint: str = _DENSE
    again: int = 1
    cold: bool = False
    python: str = "our"


RUNS: Mapping[str, Run] = {
    "ours": Run("ours", again=2),
    "ours, cold": Run("ours", again=2, cold=True),
    "Tunix": Run("tunix", python="tunix"),
    "safetensors + device_put": Run("device_put"),
    "fastsafetensors": Run("fastsafetensors", python="torch"),
    "transformers": Run("transformers", python="torch"),
    "ours, 128 experts": Run("ours", _EXPERTS),
    "ours, Orbax": Run("ours", _GEMMA, again=0),
    "Orbax StandardCheckpointer": Run("orbax_standard", _GEMMA, again=0),
    "Orbax PyTreeCheckpointer": Run("orbax_pytree", _GEMMA, again=0),
}

#: The ratios that are wanted, by the names of their lines.
TARGETS: Mapping[str, float] = {
    "ours: speed / one thread, recycled": 0.85,
    "ours: speed / one thread, fresh": 0.65,
    "ours, cold: speed / O_DIRECT, recycled": 0.80,
    "Tunix: time / ours, recycled": 8.0,
    "Tunix: time / ours, fresh": 6.0,
    "Orbax StandardCheckpointer: time / ours, fresh": 1.0,
    "Orbax PyTreeCheckpointer: time / ours, fresh": 1.0,
}

#: The loads of one process: seconds, CPU seconds, and the seconds of the read limit beside each.
Loads = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Result:
    """What one run measured.

    Attributes:
        memory: Peak growth of a load of its own, in bytes.
        rounds: The loads of each round.
    """

    memory: Mapping[str, int]
    rounds: list[Loads]


Results = Mapping[str, Result]


@dataclass(frozen=True)
class Line:
    """A figure: its name, the values of all rounds, and what is wanted of it."""

    name: str
    values: Sequence[float]
    at_most: float | None = None

    def __str__(self) -> str:
        """A row of a Markdown table; a bound on memory holds for the worst round."""
        values, least = self.values, TARGETS.get(self.name)
        value = statistics.median(values) if self.at_most is None else max(values)
        target = verdict = ""
        if least is not None:
            target, verdict = f">= {least:.2f}", "yes" if value >= least else "no"
        elif self.at_most is not None:
            target, verdict = f"<= {self.at_most:.2f}", "yes" if value <= self.at_most else "no"
        spread = f"{min(values):.2f} .. {max(values):.2f}"
        return f"| {self.name} | {value:.2f} | {spread} | {target} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tunix-python", default=sys.executable, help="has tunix")
    parser.add_argument("--torch-python", default=sys.executable, help="has torch and its loaders")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="of the checkpoints, for trying")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where checkpoints are kept")
    parser.add_argument("--json", type=Path, help="where what was measured is written")
    args = parser.parse_args()
    pythons = {"our": sys.executable, "tunix": args.tunix_python, "torch": args.torch_python}
    folders = {n: make(n, args.scale, args.folder) for n in {RUNS[r].checkpoint for r in args.only}}
    results = measure(args.only, args.rounds, pythons, folders)
    sizes = {name: recipe.nbytes(args.scale) for name, recipe in RECIPES.items()}
    if args.json:
        args.json.write_text(
            json.dumps({"bytes": sizes, "results": results}, indent=1, default=asdict)
        )
    print("| figure | median, or most of memory | spread | target | met |")
    print("| --- | --- | --- | --- | --- |")
    for line in lines(results, sizes):
        print(line)


def measure(
    names: Sequence[str], rounds: int, pythons: Mapping[str, str], folders: Mapping[str, Path]
) -> dict[str, Result]:
    """Runs all in turn, so many times; one that cannot run is left out, and why is said."""
    results: dict[str, Result] = {}
    for turn in range(rounds + 1):  # memory first
        for name in names if turn == 0 else list(results):
            print(f"round {turn} of {rounds}: {name}", file=sys.stderr, flush=True)
            run = RUNS[name]
            found = launch(run, pythons[run.python], folders[run.checkpoint], turn == 0)
            if "missing" in found:
                print(f"{name} is left out: {found['missing']}", flush=True)
                results.pop(name, None)
            elif turn == 0:
                results[name] = Result(found, [])
            else:
                results[name].rounds.append(found)
    return results


def launch(run: Run, python: str, folder: Path, memory: bool) -> Any:
    """What a process measured, or what is missing for it."""
    peers = Path(__file__).with_name("load_peers.py")
    command = [python, str(peers), run.contestant, str(folder), "--again", str(run.again)]
    command += ["--cold"] * run.cold + ["--memory"] * memory
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return {"missing": str(error)}
    if done.returncode and run.contestant == "ours":
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    if done.returncode:
        return {"missing": f"it failed with {done.stderr.strip().splitlines()[-1:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def lines(results: Results, sizes: Mapping[str, int]) -> Iterator[Line]:
    """All figures that the results tell."""
    for name, found in results.items():
        if RUNS[name].contestant == "ours":
            yield from _against_limit(name, found.rounds)
    for name, found in results.items():
        ours = results.get("ours, Orbax" if RUNS[name].checkpoint == _GEMMA else "ours")
        if RUNS[name].contestant != "ours" and ours:
            yield from _against_ours(name, found.rounds, ours.rounds)
    for name, found in results.items():
        if not RUNS[name].cold:
            yield from _resources(name, found, sizes[RUNS[name].checkpoint])


def _against_limit(name: str, rounds: Sequence[Loads]) -> Iterator[Line]:
    for way in rounds[0][0]["limit"]:
        ratios = [[load["limit"][way] / load["seconds"] for load in loads] for loads in rounds]
        if not RUNS[name].cold:
            yield Line(f"{name}: speed / {way}, fresh", [first for first, *_ in ratios])
        if again := [ratio for _, *later in ratios for ratio in later]:
            yield Line(f"{name}: speed / {way}, recycled", again)


def _against_ours(name: str, rounds: Sequence[Loads], ours: Sequence[Loads]) -> Iterator[Line]:
    """First loads against first loads, later ones against later ones, of the same round."""
    pairs = list(zip(rounds, ours, strict=False))
    kinds: Mapping[str, Callable[[Loads], float]] = {"recycled": _again, "fresh": _first}
    for kind, seconds in kinds.items():
        if pairs and (kind == "fresh" or RUNS[name].again):
            yield Line(f"{name}: time / ours, {kind}", [seconds(a) / seconds(b) for a, b in pairs])


def _first(loads: Loads) -> float:
    return float(loads[0]["seconds"])


def _again(loads: Loads) -> float:
    return statistics.median(load["seconds"] for load in loads[1:])


def _resources(name: str, found: Result, size: int) -> Iterator[Line]:
    """CPU time is that of the last load of a round."""
    bound = 1 + _SPARE_BYTES / size if RUNS[name].contestant == "ours" else None
    yield Line(f"{name}: peak anonymous memory / model", [found.memory["anonymous"] / size], bound)
    yield Line(f"{name}: peak resident memory / model", [found.memory["resident"] / size])
    cpu = [loads[-1]["cpu"] / size * 1e9 for loads in found.rounds]
    yield Line(f"{name}: CPU seconds / GB", cpu)


if __name__ == "__main__":
    main()
