"""The examples of trainers, against one real server that one of them sees killed."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flax import nnx

import distill
import grpo
import moorage
import reward
from conftest import GOLDEN
from local_models import Rows, load, padded, token_logprobs
from server_process import free_port, server_process

ROOT = Path(__file__).parent.parent
POLICY = GOLDEN / "qwen3_f32"
DOCUMENT = (ROOT / "docs" / "trainers.md").read_text()


class Server:
    """A server that may be killed, and started again on its port with what it had."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._folder, self._stack = folder, stack
        self.start()

    def start(self) -> None:
        self.now = self._stack.enter_context(
            server_process(
                GOLDEN,
                self._folder,
                *("--state", str(self._folder / "state"), "--restore"),
                address=self.address,
                mesh="fsdp=1,tp=1",
                buckets="8x128",
                outputs="logprobs,top_k,score",
            )
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ExitStack() as stack:
        yield Server(tmp_path_factory.mktemp("server"), stack)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[moorage.Client]:
    with moorage.connect(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def reference(client: moorage.Client) -> moorage.Model:
    return client.load(POLICY.name, "internal", POLICY.name, dtype="float32", lease=60)


@pytest.fixture(scope="module")
def compared(server: Server) -> tuple[list[float], list[float]]:
    """What the command finds with the reference remote, and with it in this process."""
    with redirect_stdout(io.StringIO()) as output:
        code = grpo.main([str(POLICY), "--server", server.address, "--compare"])
    remote, local = (floats(line) for line in output.getvalue().splitlines())
    assert code == (remote != local)
    return remote, local


def floats(line: str) -> list[float]:
    return [float(word) for word in line.partition(":")[2].split()]


class KilledMidStep:
    """A reference whose server is killed while it has a request of the second step.

    It is stopped first, so that it cannot have answered.
    """

    def __init__(self, model: moorage.Model, server: Server, pool: ThreadPoolExecutor) -> None:
        self.model, self.server, self.pool = model, server, pool
        self.calls = 0
        self.restart: Future[None] | None = None

    def forward_async(self, rows: Rows, *, from_position: int) -> Future[Any]:
        self.calls += 1
        is_second_step = self.calls == len(grpo.PROMPTS) + 1
        if is_second_step:
            self.server.now.process.send_signal(signal.SIGSTOP)
        answer = self.model.forward_async(rows, from_position=from_position)
        if is_second_step:
            time.sleep(0.2)
            assert not answer.done()
            self.server.now.kill()
            self.restart = self.pool.submit(self.server.start)
        return answer


def test_the_loss_is_the_same_to_the_bit(compared: tuple[list[float], list[float]]) -> None:
    remote, local = compared
    assert remote == local
    assert len(set(local)) == 3


def test_the_loss_is_the_same_over_a_kill(
    server: Server, reference: moorage.Model, compared: tuple[list[float], list[float]]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        killed = KilledMidStep(reference, server, pool)
        losses = grpo.train(load(POLICY), killed, 3)
        assert killed.restart is not None
        killed.restart.result()
    assert losses == compared[1]


class OrdinaryJit:
    """A reference in this process as a trainer would write it: one jitted function."""

    def __init__(self) -> None:
        self.model = load(POLICY)
        self.logprobs = nnx.jit(token_logprobs)

    def forward_async(self, rows: Rows, *, from_position: int) -> Future[Any]:
        table = np.asarray(self.logprobs(self.model, *padded(rows, grpo.WIDTH)))
        cut = [
            line[from_position - 1 : len(row) - 1] for line, row in zip(table, rows, strict=True)
        ]
        answer: Future[Any] = Future()
        answer.set_result(SimpleNamespace(logprobs=cut))
        return answer


def test_an_ordinary_jit_is_near(compared: tuple[list[float], list[float]]) -> None:
    """It is another program than the server's, so not the same to the bit."""
    losses = grpo.train(load(POLICY), OrdinaryJit(), 3)
    np.testing.assert_allclose(losses, compared[1], rtol=0, atol=1e-8)


def test_grpo_loss_of_known_logprobs() -> None:
    """The reference finds every token e^0.5 times as likely as transformers does the policy."""
    with np.load(POLICY / "golden.npz") as golden:
        tokens, logprobs = golden["plain/tokens"], golden["plain/logprobs"][:, 1:]
    completion = np.ones_like(logprobs)
    completion[0, :5] = completion[1, :15] = 0
    advantages = np.array([1.0, -0.5], np.float32)
    batch = grpo.Batch(tokens, np.ones_like(tokens), completion, logprobs + 0.5, advantages)
    loss = nnx.jit(grpo.grpo_loss)(load(POLICY), batch)
    assert float(loss) == pytest.approx(0.04 * 0.1487213 - 0.25, abs=1e-6)


def test_top_k_divergence_of_four_tokens() -> None:
    """Teacher 1/2, 1/4 and 1/4 for the others; student 1/4 each, so 1/2 for the others."""
    student, ids = np.log(np.full((1, 4), 0.25, np.float32)), np.array([[2, 0]])
    found = distill.top_k_divergence(student, ids, np.log(np.float32([[0.5, 0.25]])))
    np.testing.assert_allclose(found, [0.25 * np.log(2)], rtol=1e-6)


def test_distillation_loss_is_that_of_full_logits(client: moorage.Client) -> None:
    """The teacher's full logits are those that transformers computed."""
    with np.load(GOLDEN / "llama3" / "golden.npz") as golden:
        tokens, logits = golden["plain/tokens"], golden["plain/logits"][:, :-1]
    teacher = client.load("llama3", "internal", "llama3", dtype="float32")
    student = load(POLICY)
    batch = distill.batch_of(tokens, distill.ask(teacher, tokens, 32).result())
    loss = float(nnx.jit(distill.distillation_loss)(student, batch))

    p, q = softmax(logits), softmax(student(tokens)[0][:, :-1])
    order = np.argsort(-p, axis=-1, kind="stable")
    p, q = (np.take_along_axis(x, order, axis=-1) for x in (p, q))
    whole = (p * np.log(p / q)).sum(-1).mean()
    p, q = (np.append(x[..., :32], x[..., 32:].sum(-1, keepdims=True), axis=-1) for x in (p, q))
    assert loss == pytest.approx((p * np.log(p / q)).sum(-1).mean(), abs=2e-6)
    assert 0.5 * whole < loss < whole


def softmax(logits: Any) -> np.ndarray:
    exponentials = np.exp(np.asarray(logits, np.float64))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.soak
def test_distillation_learns(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    distill.main([str(POLICY), "llama3", "--server", server.address])
    losses = floats(capsys.readouterr().out)
    assert len(losses) == 12
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


def test_rewards(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of rows of 20, 13 and 3 tokens, as transformers scored them."""
    with np.load(GOLDEN / "qwen3_reward" / "golden.npz") as golden:
        tokens = golden["right_pad/tokens"].tolist()
    rows = [tokens[0], tokens[1][:13], tokens[2][:3]]
    line = json.dumps({"prompt": [], "completions": rows})
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\n"))
    reward.main(["qwen3_reward", "--server", server.address])
    found = json.loads(capsys.readouterr().out)
    assert found["rewards"] == pytest.approx([0.7337889, 0.0509531, 2.0535643], abs=3e-5)
    assert found["advantages"] == pytest.approx([-0.20853, -0.87919, 1.08772], abs=1e-4)
    assert found["best"] == rows[2]


def test_the_document_runs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOORAGE_SERVER", server.address)
    names: dict[str, Any] = {}
    for text in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL):
        exec(compile(text, "trainers.md", "exec"), names)
    names["client"].close()
    assert [len(row) for row in names["reference_logprobs"]] == [3, 2]
    assert names["teacher_ids"][0].shape == (5, 8)
    assert len(names["rewards"]) == 2


@pytest.mark.soak
def test_tunix_learns_the_same(
    server: Server, client: moorage.Client, reference: moorage.Model
) -> None:
    """Over a kill, too. Tunix's model is another program than ours, so the loss is near."""
    python = os.environ.get("MOORAGE_TUNIX_PYTHON")
    if not python:
        pytest.skip("MOORAGE_TUNIX_PYTHON names no Python with google-tunix and the moorage client")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "client")}
    del environment["XLA_FLAGS"]
    run = partial(subprocess.run, capture_output=True, text=True, env=environment)
    imports = run([python, "-c", "import moorage, tunix.rl.rl_cluster"])
    if imports.returncode:
        pytest.skip(f"{python} cannot import both: {imports.stderr.splitlines()[-1]}")
    example = [python, str(ROOT / "examples" / "grpo_tunix.py"), str(POLICY), "--compare"]
    before = client.model(reference.handle).forward_count
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, [*example, "--server", server.address])
        while not running.done() and client.model(reference.handle).forward_count == before:
            time.sleep(0.01)
        server.now.kill()
        server.start()
        done = running.result()
    assert done.returncode == 0, done.stderr
    remote, local = (floats(line) for line in done.stdout.splitlines())
    assert len(remote) == 3
    # The loss adds up advantages of about one in float32, whose last bit is 1.2e-7.
    np.testing.assert_allclose(remote, local, rtol=0, atol=1e-7)
    assert 1 <= client.model(reference.handle).forward_count <= 3
