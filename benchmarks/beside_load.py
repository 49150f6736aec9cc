"""Forward's median while another model loads, against its idle median: a ratio of one run.

    python benchmarks/beside_load.py

A server process on 8 CPU devices, mesh fsdp=4, tp=2, holds SmolLM2-135M-Instruct and scores one row
of 128 tokens over and over. Meanwhile half a Qwen3 1.7B (2 GB, random weights) is loaded and
unloaded; its programs are compiled anew the first time, and taken from the compile cache after.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

for folder in ("examples", "tests"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))

import load_checkpoints

import moorage
import real_models
from moorage import Model, Scores
from server_process import server_process

ROW = [list(range(3, 131))]
IDLE_FORWARDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loads", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="of the model that is loaded")
    parser.add_argument("--folder", type=Path, default=load_checkpoints.FOLDER)
    args = parser.parse_args()
    served = real_models.make("smollm2-135m-instruct")
    other = load_checkpoints.make("qwen3-1.7b-half", args.scale, args.folder)
    roots = ("--root", str(served.parent))
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(other.parent, Path(folder), *roots, mesh="fsdp=4,tp=2") as server,
        moorage.connect(server.address) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        model = client.load("SmolLM2", "internal", str(served), progress=False)
        idle = forwards(model, enough(IDLE_FORWARDS))
        print(f"{'':12}{'load s':>8}{'forwards':>10}{'median ms':>11}{'most ms':>9}{'ratio':>7}")
        print_line("idle", 0.0, idle, idle)
        for number in range(args.loads):
            begin = time.perf_counter()
            loading = pool.submit(client.load, other.name, "internal", str(other), progress=False)
            beside = forwards(model, until(loading))
            seconds = time.perf_counter() - begin
            client.unload(loading.result())
            idle = forwards(model, enough(IDLE_FORWARDS))  # of the same minute
            print_line("cold compile" if number == 0 else "load", seconds, beside, idle)


def forwards(model: Model[Scores], go_on: Callable[[int], bool]) -> list[float]:
    """Seconds of forward passes, one after another, as long as their number lets it go on."""
    model.forward(ROW)
    taken: list[float] = []
    while go_on(len(taken)):
        begin = time.perf_counter()
        model.forward(ROW)
        taken.append(time.perf_counter() - begin)
    return taken


def enough(number: int) -> Callable[[int], bool]:
    return lambda done: done < number


def until(loading: Future[Model[Scores]]) -> Callable[[int], bool]:
    return lambda done: not loading.done() or not done


def print_line(name: str, seconds: float, taken: list[float], idle: list[float]) -> None:
    median = statistics.median(taken)
    ratio = median / statistics.median(idle)
    print(
        f"{name:12}{seconds:8.2f}{len(taken):10}{median * 1e3:11.1f}{max(taken) * 1e3:9.1f}"
        f"{ratio:7.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
