"""Ten times what a server can do, in processes: what is done, what is refused, and who gets it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

import moorage
from conftest import GOLDEN
from golden_server import load as load_golden
from overload import Load, finish_all, flood, keep_busy, sized
from server_process import server_process

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

MODEST, ROUNDS = 4, 3


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Iterator[Load]:
    """Requests of which a server process can do ten to twenty a second; some twenty may wait."""
    folder = tmp_path_factory.mktemp("server")
    flags = ("--queue-tokens", str(1 << 18), "--outputs", "logprobs", "--log-level", "warning")
    with server_process(GOLDEN, folder, *flags, mesh="tp=1", buckets="8x128") as server:
        with moorage.connect(server.address) as client:
            handle = load_golden(client).handle
        yield sized(Load(server.address, handle, 80))
        assert "unexpected error" not in server.log.read_text()


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes of clients, which run when the server leaves a core: they stand for other hosts."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1 + MODEST, spawn, initializer=os.nice, initargs=(19,)) as made:
        yield made


def test_ten_times_the_load(load, pool):
    """Peaks and floods take turns: the speed of a machine that others use differs by the minute."""
    peaks, floods = [], []
    for _ in range(ROUNDS):
        peaks.append(pool.submit(keep_busy, load, 4, 20.0).result())
        floods.append(pool.submit(flood, load, 10 * peaks[0], 30.0).result())
        print(f"{load.rows} rows, peak {peaks[-1]:.1f} a second, overload {floods[-1]}")
        assert set(floods[-1].counts) == {"answered", "QUEUE_FULL"}
        assert floods[-1].counts["QUEUE_FULL"] > 7 * floods[-1].counts["answered"]
    assert all(10 <= peak <= 20 for peak in peaks)
    assert sum(told.rate for told in floods) >= 0.9 * sum(peaks)


def test_the_client_library_gets_all_of_it_done(load, pool):
    counts = [pool.submit(finish_all, load, 60) for _ in range(1 + MODEST)]
    assert [count.result(120) for count in counts] == [60] * (1 + MODEST)


def test_a_greedy_client_does_not_take_the_share_of_others(load, pool):
    greedy = pool.submit(keep_busy, load, 60, 20.0)
    modest = [pool.submit(keep_busy, load, 3, 20.0) for _ in range(MODEST)]
    rates = [one.result(120) for one in [greedy, *modest]]
    fair = sum(rates) / len(rates)
    print("greedy, modest: " + ", ".join(f"{rate:.1f}" for rate in rates))
    assert min(rates[1:]) >= 0.8 * fair
