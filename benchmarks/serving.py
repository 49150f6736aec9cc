"""What the server adds to a small call, and how many of them it serves: figures of one run.

    python benchmarks/serving.py

A server process holds SmolLM2-135M-Instruct and a model so tiny that the server does nothing else,
and so does this process. The first lines are milliseconds: a call of the server above its time on
the devices, and how much more that is than of the same call in process. The two take turns of ten
calls, of which the first does not count: it finds the caches as the other has left them. Then
requests a second of 8 tokens by 1 to 32 clients, each a thread with a connection of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import turns

_REPOSITORY = Path(__file__).parent.parent
for folder in ("examples", "tests"):
    sys.path.insert(0, str(_REPOSITORY / folder))

import in_process

import moorage
import real_models
from moorage import Model, Scores
from server_process import server_process

BUCKETS = [(1, 128), (8, 128)]
LENGTHS = (128, 8)
TURN = 10
CLIENTS = (1, 2, 4, 8, 16, 32)
TINY = _REPOSITORY / "tests" / "golden" / "llama3"
TARGET = "<= 3.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="in which calls are begun")
    args = parser.parse_args()
    real = real_models.make("smollm2-135m-instruct")
    shapes = ",".join(f"{rows}x{length}" for rows, length in BUCKETS)
    flags = ("--root", str(TINY.parent), "--outputs", "logprobs")
    with (
        tempfile.TemporaryDirectory() as scratch,
        server_process(
            real.parent, Path(scratch), *flags, mesh="fsdp=1,tp=1", buckets=shapes
        ) as server,
        moorage.connect(server.address) as client,
    ):
        models = [
            client.load(folder.name, "internal", str(folder), dtype="float32", progress=False)
            for folder in (real, TINY)
        ]
        print(turns.HEADER)
        for model, folder in zip(models, (real, TINY), strict=True):
            overhead(model, folder, args.rounds)
        for model, folder in zip(models, (real, TINY), strict=True):
            for number in CLIENTS:
                rate = requests_per_second(server.address, model.handle, number, args.seconds)
                turns.show(f"{folder.name}: requests/s, {number} clients", [rate])


def overhead(served: Model[Scores], folder: Path, rounds: int) -> None:
    """Prints what a call takes above the devices, and how much more than the same in process."""
    alone = in_process.Model(folder, "float32", BUCKETS)
    for length in LENGTHS:
        ids = np.random.default_rng(0).integers(3, 100, (1, length), dtype=np.int32)

        def call(ids: np.ndarray = ids) -> float:
            times = served.forward(ids).times
            return times.execute + times.transfer

        def score(ids: np.ndarray = ids) -> float:
            return alone.scored(ids)[1]

        calls = {"call": lambda call=call: above(call), "alone": lambda score=score: above(score)}
        taken = turns.take_turns(calls, rounds)
        more = [a - b for a, b in zip(taken["call"], taken["alone"], strict=True)]
        name = f"{folder.name}, 1 x {length}: ms of a call above"
        turns.show(f"{name} the same in process", more, TARGET)
        turns.show(f"{name} the devices", taken["call"])


def above(run: turns.Run) -> float:
    """The median of milliseconds beside the devices, of calls that say the devices' seconds."""
    beside = []
    for _ in range(TURN):
        begin = time.perf_counter()
        devices = run()
        beside.append(1e3 * (time.perf_counter() - begin - devices))
    return statistics.median(beside[1:])


def requests_per_second(address: str, handle: str, clients: int, seconds: float) -> float:
    """How many passes of 8 tokens so many threads bring home, once all of them have begun."""
    ready, done = threading.Barrier(clients + 1), [0] * clients
    stop = threading.Event()

    def work(number: int) -> None:
        ids = np.random.default_rng(number).integers(3, 100, (1, 8), dtype=np.int32)
        with moorage.connect(address) as client:
            client.forward(handle, ids)
            ready.wait()
            while not stop.is_set():
                client.forward(handle, ids)
                done[number] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    begin = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
