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
from dataclasses import dataclass
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
    "ours: speed / read limit, recycled": 0.85,
    "ours: speed / read limit, fresh": 0.65,
    "ours, cold: speed / O_DIRECT limit": 0.80,
    "Tunix: time / ours, recycled": 8.0,
    "Tunix: time / ours, fresh": 6.0,
    "Orbax StandardCheckpointer: time / ours, fresh": 1.0,
    "Orbax PyTreeCheckpointer: time / ours, fresh": 1.0,
}

Result = Mapping[str, Any]
Results = Mapping[str, Sequence[Result]]


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
        args.json.write_text(json.dumps({"bytes": sizes, "results": results}, indent=1))
    print("| figure | median, or most of memory | spread | target | met |")
    print("| --- | --- | --- | --- | --- |")
    for line in lines(results, sizes):
        print(line)


def measure(
    names: Sequence[str], rounds: int, pythons: Mapping[str, str], folders: Mapping[str, Path]
) -> dict[str, list[Result]]:
    """Runs all in turn, so many times; one that cannot run is left out, and why is said."""
    results: dict[str, list[Result]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in list(results):
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            run = RUNS[name]
            result = launch(run, pythons[run.python], folders[run.checkpoint])
            if "missing" in result:
                print(f"{name} is left out: {result['missing']}", flush=True)
                del results[name]
            else:
                results[name].append(result)
    return results


def launch(run: Run, python: str, folder: Path) -> Result:
    """What a process measured, or what is missing for it."""
    peers = Path(__file__).with_name("load_peers.py")
    command = [python, str(peers), run.contestant, str(folder), "--again", str(run.again)]
    command += ["--cold"] * run.cold
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return {"missing": str(error)}
    if done.returncode and run.contestant == "ours":
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    if done.returncode:
        return {"missing": f"it failed with {done.stderr.strip().splitlines()[-1:]}"}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def lines(results: Results, sizes: Mapping[str, int]) -> Iterator[Line]:
    """All figures that the results tell."""
    for name, found in results.items():
        if RUNS[name].contestant == "ours":
            yield from _against_limit(name, found)
    for name, found in results.items():
        ours = results.get("ours, Orbax" if RUNS[name].checkpoint == _GEMMA else "ours", [])
        if RUNS[name].contestant != "ours":
            yield from _against_ours(name, found, ours)
    for name, found in results.items():
        if not RUNS[name].cold:
            yield from _resources(name, found, sizes[RUNS[name].checkpoint])


def _against_limit(name: str, found: Sequence[Result]) -> Iterator[Line]:
    loads = [[load["limit"] / load["seconds"] for load in result["loads"]] for result in found]
    again = [ratio for ratios in loads for ratio in ratios[1:]]
    if RUNS[name].cold:
        yield Line(f"{name}: speed / O_DIRECT limit", again)
        return
    if again:
        yield Line(f"{name}: speed / read limit, recycled", again)
    yield Line(f"{name}: speed / read limit, fresh", [ratios[0] for ratios in loads])


def _against_ours(name: str, found: Sequence[Result], ours: Sequence[Result]) -> Iterator[Line]:
    """First loads against first loads, later ones against later ones, of the same round."""
    pairs = list(zip(found, ours, strict=False))
    kinds: Mapping[str, Callable[[Result], float]] = {"recycled": _again, "fresh": _first}
    for kind, seconds in kinds.items():
        if pairs and (kind == "fresh" or RUNS[name].again):
            yield Line(f"{name}: time / ours, {kind}", [seconds(a) / seconds(b) for a, b in pairs])


def _first(result: Result) -> float:
    return float(result["loads"][0]["seconds"])


def _again(result: Result) -> float:
    return float(statistics.median(load["seconds"] for load in result["loads"][1:]))


def _resources(name: str, found: Sequence[Result], size: int) -> Iterator[Line]:
    """Memory is that of the first load, CPU time that of the last."""
    bound = 1 + _SPARE_BYTES / size if RUNS[name].contestant == "ours" else None
    anonymous, resident = (
        [result["memory"][kind] / size for result in found] for kind in ("anonymous", "resident")
    )
    cpu = [result["loads"][-1]["cpu"] / size * 1e9 for result in found]
    yield Line(f"{name}: peak anonymous memory / model", anonymous, bound)
    yield Line(f"{name}: peak resident memory / model", resident)
    yield Line(f"{name}: CPU seconds / GB", cpu)


if __name__ == "__main__":
    main()
