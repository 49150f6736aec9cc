"""A server that is told to stop under load, over and over: nobody loses anything by it."""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import moorage
from conftest import GOLDEN
from server_process import free_port, server_process

ROWS = [[1, 5, 9, 4], [7, 2], list(range(3, 120))]
DRAIN_SECONDS = 10.0
CLOSE_SECONDS = 3.0  # for the calls that are left, and threads that do not end


class Scorers:
    """Clients that score without a pause. Nothing that they get may be an error, or be wrong.

    Attributes:
        answers: How many each has had.
        wrong: Whatever should not have come.
    """

    def __init__(self, address: str, count: int) -> None:
        self.answers = [0] * count
        self.wrong: list[object] = []
        self._expected: list[np.ndarray] = []
        self._stop = threading.Event()
        self._clients = [moorage.connect(address, timeout=120.0) for _ in range(count)]
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]

    def __enter__(self) -> Scorers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.close()
        for thread in self._threads:
            thread.join(60)

    def _run(self, number: int) -> None:
        client = self._clients[number]
        try:
            model = client.load("llama3", "internal", "llama3", progress=False)
            while not self._stop.is_set():
                self._check(client.forward(model, ROWS).logprobs)
                self.answers[number] += 1
        except Exception as error:
            if not self._stop.is_set():
                self.wrong.append(error)

    def _check(self, rows: list[np.ndarray]) -> None:
        self._expected = self._expected or rows
        for found, wanted in zip(rows, self._expected, strict=True):
            if not np.array_equal(found, wanted, equal_nan=True):
                self.wrong.append(rows)

    def wait_for_answers(self) -> None:
        """Returns once each has had another answer."""
        before, deadline = list(self.answers), time.monotonic() + 60
        while any(a == b for a, b in zip(self.answers, before, strict=True)) and not self.wrong:
            assert time.monotonic() < deadline, self.answers
            time.sleep(0.005)


def seconds_until_not_ready(probes: str, terminate: threading.Event) -> list[float]:
    """Starts to watch readiness; gives a list that will have the seconds from the signal on."""
    seconds: list[float] = []

    def watch() -> None:
        with grpc.insecure_channel(probes) as channel:
            request = health_pb2.HealthCheckRequest(service="ready")
            answers = health_pb2_grpc.HealthStub(channel).Watch(request, wait_for_ready=True)
            ready = health_pb2.HealthCheckResponse.SERVING
            while next(answers).status != ready:
                pass
            terminate.set()
            begin = time.monotonic()
            while next(answers).status == ready:
                pass
            seconds.append(time.monotonic() - begin)
            answers.cancel()

    threading.Thread(target=watch, daemon=True).start()
    return seconds


def run(tmp_path: Path, times: int, scorers: int) -> tuple[list[float], list[float]]:
    """Stops a server under load; gives seconds until it was not ready, and until it was gone."""
    dice, address = random.Random(0), f"127.0.0.1:{free_port()}"
    probes = f"127.0.0.1:{free_port()}"
    flags = ("--state", str(tmp_path / "state"), "--restore", "--health-listen", probes)
    flags += ("--drain-seconds", str(DRAIN_SECONDS), "--log-level", "warning")
    unready, gone = [], []
    clients = Scorers(address, scorers)
    with ExitStack() as stack:
        for _ in range(times):
            with server_process(
                GOLDEN, tmp_path, *flags, address=address, outputs="logprobs"
            ) as server:
                if not gone:
                    stack.enter_context(clients)
                clients.wait_for_answers()
                time.sleep(dice.random() * 0.1)
                serving = threading.Event()
                seconds = seconds_until_not_ready(probes, serving)
                assert serving.wait(30)
                begin = time.monotonic()
                assert server.stop(DRAIN_SECONDS + CLOSE_SECONDS) == 0
                gone.append(time.monotonic() - begin)
                unready += seconds
            assert clients.wrong == []
        with server_process(GOLDEN, tmp_path, *flags, address=address, outputs="logprobs"):
            clients.wait_for_answers()
    assert clients.wrong == []
    return unready, gone


@pytest.mark.soak
def test_a_hundred_stops_under_load(tmp_path: Path) -> None:
    unready, gone = run(tmp_path, 100, 6)
    print(f"not ready after {max(unready) * 1e3:.0f} ms, gone after {max(gone):.2f} s at the most")
    assert len(unready) == 100
    assert max(unready) < 0.1
    assert max(gone) < DRAIN_SECONDS + CLOSE_SECONDS
