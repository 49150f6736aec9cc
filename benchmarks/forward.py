"""Forward against transformers, and the server against the engine in process: ratios of one run.

    make bench          needs torch and transformers for the first ratio; says so without them

All compute per-token log-probabilities of SmolLM2-135M-Instruct in float32 on one CPU device, on
the same random ids. Each figure is the median of pairs that take turns.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

os.environ["JAX_PLATFORMS"] = "cpu"

import asyncio
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import moorage
import real_models
from moorage_models.sources import Policy
from moorage_server.cache import ModelCache
from moorage_server.engine import Bucket
from moorage_server.engine.local import LocalEngine, make_mesh
from moorage_server.main import make_server
from moorage_server.scoring import make_rows, score

SHAPES = [(1, 128), (8, 512)]
ROUNDS = 7


def main() -> None:
    folder = real_models.make("smollm2-135m-instruct")
    buckets = [Bucket(length, rows) for rows, length in SHAPES]
    engine = LocalEngine(make_mesh({"fsdp": 1, "tp": 1}), buckets)
    address, stop = serve(engine, folder.parent)
    with moorage.connect(address) as client:
        model = client.load("smollm2", "internal", folder.name, dtype="float32")
        alone = InProcess(engine, model.handle)
        print(f"{'shape':>8}{'server/in process':>22}{'overhead ms':>14}{'transformers/ours':>20}")
        for rows, length in SHAPES:
            ids = np.random.default_rng(0).integers(3, 49_000, (rows, length)).astype(np.int32)
            ours = lambda ids=ids: alone.score(ids)  # noqa: E731
            served = lambda ids=ids: model.forward(ids)  # noqa: E731
            ratio, overhead = compare(served, ours)
            peer = transformers_run(folder, ids)
            against = f"{compare(peer, ours)[0]:.2f}" if peer else "not installed"
            print(
                f"{rows}x{length:<6}{ratio:>22.3f}{overhead * 1e3:>14.2f}{against:>20}", flush=True
            )
    stop()


class InProcess:
    """A loaded model, scored without a server."""

    def __init__(self, engine: LocalEngine, handle: str) -> None:
        self._engine = engine
        self._handle = handle
        self._config = engine._models[handle].programs.config
        self._thread = ThreadPoolExecutor(1)

    def score(self, ids: np.ndarray) -> np.ndarray:
        rows = make_rows(ids.reshape(-1).tolist(), [ids.shape[1]] * len(ids), [])
        run = lambda batch, outputs: self._engine.forward(self._handle, batch, outputs)  # noqa: E731
        buckets = self._engine.info().buckets
        return self._thread.submit(score, rows, self._config, ["logprobs"], buckets, run).result()[
            "logprobs"
        ]


def compare(one: Callable[[], object], two: Callable[[], object]) -> tuple[float, float]:
    """The median ratio and difference of seconds, one to two, of rounds that take turns."""
    one(), two()
    ratios, differences = [], []
    for _ in range(ROUNDS):
        seconds = []
        for run in (one, two):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
        differences.append(seconds[0] - seconds[1])
    return statistics.median(ratios), statistics.median(differences)


def transformers_run(folder: Path, ids: np.ndarray) -> Callable[[], object] | None:
    """The same by transformers with torch, if they are installed."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.from_numpy(ids).long()

    @torch.no_grad()
    def run() -> object:
        logits = model(tokens, use_cache=False).logits[:, :-1]
        return torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])

    return run


def serve(engine: LocalEngine, root: Path) -> tuple[str, Callable[[], None]]:
    """Serves an engine from a thread; gives its address, and what stops it."""
    ready, stopped = threading.Event(), []
    address = ""

    async def run() -> None:
        nonlocal address
        policy = Policy(roots=(root,))
        server, _ = make_server(ModelCache(engine, policy), engine, policy)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        stopped.append(lambda: loop.call_soon_threadsafe(stop.set))
        ready.set()
        await stop.wait()
        await server.stop(0)

    threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
    ready.wait()
    return address, stopped[0]


if __name__ == "__main__":
    main()
