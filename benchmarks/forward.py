"""A forward pass in process against transformers and Tunix: speeds of one run.

    make bench ARGS="--torch-python P --tunix-python T"

Each contestant is a process of its own that holds one real checkpoint on the CPU, and is told when
to score: they take turns. All give per-token log-probabilities of the same ids, and each line's
figure is our speed over theirs (their seconds by ours, round by round). A contestant that is not
installed, cannot load the model, finds other numbers, or would need more memory than there is, is
left out, and the run says so. One that is very slow scores once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import turns

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import real_models

MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
DTYPES = ("float32", "bfloat16")
#: What is wanted of our speed over the faster peer's, by rows and length.
TARGETS: Mapping[tuple[int, int], str] = {(1, 128): ">= 0.9", (8, 512): ">= 1.0"}

_SLOW_SECONDS = 10.0  # of one pass of the first shape: it scores once, and the second never
_BUDGET_SECONDS = 40.0
_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of the mean, relative
_LOGITS = 3  # copies of all logits, in float32, that a peer may hold


class Contestant:
    """A process that scores when it is told to.

    Args:
        name: As `forward_peers.py` names it.
        python: Whose interpreter.
        folder: The checkpoint.
        dtype: Of parameters and arithmetic.

    Attributes:
        missing: Why it cannot take part; empty if it can.
        mean: Of the log-probabilities that it found last.
    """

    def __init__(self, name: str, python: str, folder: Path, dtype: str) -> None:
        script = str(Path(__file__).with_name("forward_peers.py"))
        command = [python, script, name, str(folder), "--dtype", dtype]
        self.missing, self.mean = "", 0.0
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            self.missing = str(error)
        else:
            self._answer()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def run(self, rows: int, length: int) -> float:
        """Seconds of one pass; infinite if it failed, and `missing` says that."""
        if self.missing:
            return float("inf")
        assert self._process
        assert self._process.stdin
        self._process.stdin.write(f"{rows} {length}\n")
        self._process.stdin.flush()
        said = self._answer()
        self.mean = said.get("mean", 0.0)
        return float(said.get("seconds", "inf"))

    def _answer(self) -> dict[str, Any]:
        assert self._process
        assert self._process.stdout
        line = self._process.stdout.readline()
        said: dict[str, Any] = json.loads(line or '{"missing": "its process ended"}')
        self.missing = said.get("missing", "")
        return said


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-python", default=sys.executable, help="has torch, transformers")
    parser.add_argument("--tunix-python", default=sys.executable, help="has tunix")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    args = parser.parse_args(argv)
    pythons = {"ours": sys.executable, "torch": args.torch_python, "tunix": args.tunix_python}
    print(turns.HEADER)
    for model in args.models:
        folder = real_models.make(model)
        for dtype in DTYPES:
            with ExitStack() as stack:
                all_of_them = {
                    name: stack.enter_context(Contestant(name, python, folder, dtype))
                    for name, python in pythons.items()
                }
                compare(f"{model}, {dtype}", folder, dtype, all_of_them, args.rounds)


def compare(
    name: str, folder: Path, dtype: str, contestants: Mapping[str, Contestant], rounds: int
) -> None:
    """Prints the figures of one model and dtype, at every shape."""
    ours = contestants["ours"]
    if ours.missing:
        raise SystemExit(f"{name}: {ours.missing}")
    for (rows, length), target in TARGETS.items():
        shape = f"{name}, {rows} x {length}"
        ours.run(rows, length)
        first = first_passes(shape, folder, (rows, length), contestants)
        for peer in first:
            mean = contestants[peer].mean
            if abs(mean - ours.mean) > _TOLERANCE[dtype] * abs(ours.mean):
                print(f"| {shape}: {peer} finds {mean:.3f}, ours {ours.mean:.3f} | | | | |")
        slow = _SLOW_SECONDS if rows == 1 else float("inf")
        quick = ["ours", *(peer for peer, seconds in first.items() if seconds < slow)]
        runs = {
            peer: lambda other=contestants[peer], rows=rows, length=length: other.run(rows, length)
            for peer in quick
        }
        taken = turns.take_turns(runs, rounds, _BUDGET_SECONDS, warm=True)
        for peer, seconds in first.items():
            theirs = taken.get(peer) or [seconds] * len(taken["ours"])
            once = "" if peer in quick else ", which scored once"
            values = turns.ratios(theirs, taken["ours"])
            turns.show(f"{shape}: speed / {peer}{once}", values, target)
            if once:
                contestants[peer].missing = f"a pass of {rows} x {length} took {seconds:.0f} s"


def first_passes(
    shape: str, folder: Path, sizes: tuple[int, int], contestants: Mapping[str, Contestant]
) -> dict[str, float]:
    """Seconds of a pass of every peer that can make one; says why others cannot."""
    rows, length = sizes
    needed = _LOGITS * 4 * rows * length * vocabulary(folder)
    seconds = {}
    for peer, other in contestants.items():
        if peer == "ours":
            continue
        if not other.missing and needed > available():
            left_out(shape, peer, f"its logits may take {needed / 1e9:.0f} GB")
            continue
        taken = other.run(rows, length)  # with its compile
        if rows == 1:
            taken = other.run(rows, length)
        if other.missing:
            left_out(shape, peer, other.missing)
        else:
            seconds[peer] = taken
    return seconds


def left_out(name: str, peer: str, why: str) -> None:
    print(f"| {name}: {peer} is left out: {why.splitlines()[0]} | | | | |", flush=True)


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def available() -> int:
    """Bytes of memory that are free, or would be without the page cache."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(kilobytes) * 1024


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads do not spin beside others
    main()
