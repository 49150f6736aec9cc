"""A hundred thousand requests of every kind: memory stays flat, and nothing fails by itself."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import moorage
from conftest import GOLDEN
from server_process import server_process

OUTPUTS = "logprobs,entropy,top_k,candidates,logits,hidden"
NAMES = ("llama3", "qwen3_tied")
MEBIBYTE = 1 << 20

Client = moorage.Client
Model = moorage.Model[moorage.Scores]


def rows(dice: random.Random) -> list[list[int]]:
    lengths = [dice.choice([1, 3, 20, 100, 128]) for _ in range(dice.randint(1, 3))]
    return [[dice.randrange(2, 300) for _ in range(length)] for length in lengths]


def score(client: Client, model: Model, dice: random.Random) -> None:
    ragged = rows(dice)
    found = client.forward(model, ragged, temperature=dice.choice([0.5, 1.0]))
    assert [len(row) for row in found.logprobs] == list(map(len, ragged))


def ask_for_more(client: Client, model: Model, dice: random.Random) -> None:
    names = dice.choice([["logprobs", "entropy"], ["logits"], ["hidden"]])
    client.forward(model, rows(dice), names)


def ask_for_tokens(client: Client, model: Model, dice: random.Random) -> None:
    client.forward(model, rows(dice), top_k=dice.choice([1, 8, 20]))
    client.forward(model, rows(dice), candidates=[3, 5, 8])


def describe(client: Client, model: Model, dice: random.Random) -> None:
    assert model.handle in {other.handle for other in client.models()}
    assert client.model(model.handle).state == "ready"
    assert client.info().compiles_after_ready == 0


def resolve(client: Client, model: Model, dice: random.Random) -> None:
    client.resolve(dice.choice(["google/gemma-2-2b-it", "llama3p1_8b", "Qwen/Qwen3-0.6B"]))


def join(client: Client, model: Model, dice: random.Random) -> None:
    client.load(model.path, "internal", model.path, lease=30, progress=False)
    client.release(model)


def watch(client: Client, model: Model, dice: random.Random) -> None:
    changes = client.watch()
    next(changes)
    changes.close()


def be_wrong(client: Client, model: Model, dice: random.Random) -> None:
    calls: list[tuple[str, Callable[[], object]]] = [
        ("TOKEN_OUT_OF_RANGE", lambda: client.forward(model, [[1, 1 << 30]])),
        ("SEQUENCE_TOO_LONG", lambda: client.forward(model, [[1] * 129])),
        ("MODEL_NOT_LOADED", lambda: client.forward("nobody", [[1]])),
        ("CHECKPOINT_NOT_FOUND", lambda: client.load("x", "internal", "nowhere", progress=False)),
        ("SOURCE_NOT_ALLOWED", lambda: client.load("x", "internal", "../x", progress=False)),
    ]
    reason, call = dice.choice(calls)
    with pytest.raises(moorage.Error) as caught:
        call()
    assert caught.value.reason == reason


KINDS: Mapping[Callable[[Client, Model, random.Random], None], int] = {
    score: 60,
    ask_for_more: 8,
    ask_for_tokens: 4,
    describe: 3,
    resolve: 4,
    join: 3,
    watch: 2,
    be_wrong: 6,
}


class Crowd:
    """Threads with a client each, which ask for anything until there were enough requests.

    Attributes:
        asked: How many times each kind was asked.
        wrong: Whatever should not have come.
    """

    def __init__(self, address: str, count: int) -> None:
        self.asked: Counter[str] = Counter()
        self.wrong: list[BaseException] = []
        self._address, self._enough = address, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, number: int) -> None:
        dice = random.Random(number)
        try:
            while not self._enough.is_set():  # connections come and go, too
                with moorage.connect(self._address, timeout=60) as client:
                    model = client.load(NAMES[number % 2], "internal", NAMES[number % 2])
                    for kind in dice.choices(list(KINDS), list(KINDS.values()), k=500):
                        kind(client, model, dice)
                        self.asked[kind.__name__] += 1
                        if self._enough.is_set():
                            return
        except BaseException as error:
            self.wrong.append(error)
            self._enough.set()

    def wait_for(self, requests: int) -> None:
        while sum(self.asked.values()) < requests and not self._enough.is_set():
            time.sleep(0.05)


def resident(process: int) -> float:
    """MiB of memory that a process has for itself."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def run(folder: Path, requests: int) -> tuple[list[float], Counter[str]]:
    """The server's memory in MiB after each tenth of the requests, and what was asked."""
    memory = []
    with server_process(GOLDEN, folder, buckets="1x128,4x128", outputs=OUTPUTS) as server:
        with Crowd(server.address, 8) as crowd:
            for tenth in range(1, 11):
                crowd.wait_for(requests * tenth // 10)
                memory.append(resident(server.process.pid))
        assert crowd.wrong == []
        with moorage.connect(server.address) as client:
            activity = client.info().activity
        assert activity.forwards >= crowd.asked["score"]
        assert (activity.queued_tokens, activity.forwards_under_way, activity.leases) == (0, 0, 0)
        assert sum(activity.refusals.values()) == crowd.asked["be_wrong"]
        assert "Traceback" not in server.log.read_text()
        assert server.stop() == 0
    return memory, crowd.asked


@pytest.mark.soak
def test_a_hundred_thousand_requests(tmp_path: Path) -> None:
    begin = time.monotonic()
    memory, asked = run(tmp_path, 100_000)
    assert asked.keys() == {kind.__name__ for kind in KINDS}
    print(f"{dict(asked)} in {time.monotonic() - begin:.0f} s; MiB by tenths: {memory}")
    # Answers are kept for a minute. It goes up and down by as much; 1 KB a request is 70.
    assert memory[-1] - memory[2] < 40
