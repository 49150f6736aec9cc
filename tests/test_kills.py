"""A server that is killed over and over: right answers or retryable errors, and no others."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import moorage
from conftest import GOLDEN
from server_process import free_port, server_process

ROWS = [[1, 5, 9, 4], [7, 2]]
NAMES = ("llama3", "qwen3_tied")


class Clients:
    """Threads that load and score until they are told to stop.

    Attributes:
        answers: Scores that came, by the model.
        wrong: Whatever should not have come.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.answers = dict.fromkeys(NAMES, 0)
        self.wrong: list[object] = []
        self.first: dict[str, list[np.ndarray]] = {}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in NAMES]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, name: str) -> None:
        with moorage.connect(self.address, timeout=30.0) as client:
            while not self._stop.is_set():
                try:
                    model = client.load(name, "internal", name, progress=False)
                    while not self._stop.is_set():
                        self._check(name, client.forward(model, ROWS).logprobs)
                except (moorage.Unavailable, moorage.NotFound):
                    time.sleep(0.05)  # the server is gone, or has just come back without the model
                except Exception as error:
                    self.wrong.append(error)
                    return

    def _check(self, name: str, rows: list[np.ndarray]) -> None:
        first = self.first.setdefault(name, rows)
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, rows, strict=True)):
            self.wrong.append((name, rows))
        self.answers[name] += 1


@pytest.mark.soak
def test_fifty_kills(tmp_path: Path) -> None:
    dice, address = random.Random(0), f"127.0.0.1:{free_port()}"
    flags = ("--state", str(tmp_path / "state"), "--restore")
    with Clients(address) as clients:
        for _ in range(50):
            before = dict(clients.answers)
            with server_process(GOLDEN, tmp_path, *flags, address=address) as server:
                if dice.random() < 0.6:  # else in the middle of what is restored or loaded
                    deadline = time.monotonic() + 60
                    while any(clients.answers[n] == before[n] for n in NAMES) and not clients.wrong:
                        assert time.monotonic() < deadline, clients.answers
                        time.sleep(0.01)
                time.sleep(dice.random() * 0.5)
                with suppress(ProcessLookupError):
                    server.kill()
            assert clients.wrong == []
    assert min(clients.answers.values()) > 30
