"""What must not be seen: secrets in an answer or the log, paths of the host and tracebacks."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

import moorage
from conftest import GOLDEN
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from server_process import ServerProcess, server_process

PLANTED = {
    "HF_TOKEN": "hf_planted_secret_one",
    "KAGGLE_USERNAME": "planted-user",
    "KAGGLE_KEY": "planted_secret_two",
    "AWS_SECRET_ACCESS_KEY": "planted_secret_three",
}
TOKENS = {"score": "planted-score-token-1", "admin": "planted-admin-token-1"}
WRONG = "planted-wrong-token-1"
NOBODY = "http://127.0.0.1:9"  # no hub answers there


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("host_folder")
    tokens = folder / "tokens"
    tokens.write_text("".join(f"{role} {role} {token}\n" for role, token in TOKENS.items()))
    root = folder / "root_folder"
    root.mkdir()
    (root / "llama3").symlink_to(GOLDEN / "llama3")
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    flags = ("--tokens", str(tokens), "--root", str(GOLDEN), "--log-level", "debug")
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in PLANTED.items():
            patch.setenv(name, secret)
        for name in ("HF_ENDPOINT", "KAGGLE_API_ENDPOINT", "STORAGE_EMULATOR_HOST"):
            patch.setenv(name, NOBODY)
        patch.setenv("HF_HOME", str(folder / "hub"))
        with server_process(root, folder, *flags, token=TOKENS["score"]) as running:
            yield running


BAD = [
    ("llama3", {"source": "huggingface", "model_path": "nobody/nothing"}),
    ("llama3", {"source": "kaggle", "model_path": "google/gemma/flax/2b"}),
    ("llama3", {"source": "internal", "model_path": "broken"}),
    ("llama3", {"source": "internal", "model_path": "nowhere"}),
    ("llama3", {"source": "internal", "model_path": "../../../../etc/passwd"}),
    ("llama3", {"source": "internal", "model_path": "/srv/elsewhere"}),
    ("llama3", {"source": "internal", "model_path": "llama3", "dtype": "int3"}),
    ("llama3", {"source": "maxtext", "model_path": "broken"}),
    ("///", {"source": "huggingface"}),
    (TOKENS["score"], {"source": "huggingface"}),
]


def told(call, *arguments, **options) -> str:
    """All that a refused caller can see."""
    with pytest.raises(moorage.Error) as caught:
        call(*arguments, **options)
    cause = caught.value.__cause__
    seen = [str(caught.value), repr(caught.value.details)]
    if isinstance(cause, grpc.Call):
        seen += [cause.details() or "", repr(cause.trailing_metadata())]
    return "\n".join(seen)


def everything_refused(server: ServerProcess) -> str:
    answers = []
    with moorage.connect(server.address, token=WRONG) as stranger:
        answers += [told(stranger.models), told(stranger.info)]
    with moorage.connect(server.address, token=TOKENS["score"]) as scorer:
        answers += [told(scorer.load, "llama3", "internal", "llama3")]
    with moorage.connect(server.address, token=TOKENS["admin"], timeout=60) as admin:
        with ThreadPoolExecutor(len(BAD)) as pool:  # hubs are asked more than once
            asked = [pool.submit(told, admin.load, name, **options) for name, options in BAD]
        answers += [answer.result() for answer in asked]
        model = admin.load("llama3", "internal", "llama3")
        for rows in ([[1 << 30]], [[]], [[1] * 200]):
            answers.append(told(admin.forward, model, rows))
        answers.append(told(admin.forward, model, [[1, 2]], ["hidden"]))
        answers += [told(admin.forward, "nobody", [[1]]), told(admin.unload, "nobody")]
        answers.append(repr(admin.info()) + repr(admin.models()))
    return "\n".join(answers)


def test_no_secret_no_path_and_no_traceback_is_told(server: ServerProcess) -> None:
    answers, log = everything_refused(server), server.log.read_text()
    for secret in [*PLANTED.values(), *TOKENS.values(), WRONG]:
        if secret != TOKENS["score"]:  # which was given as the name of a model
            assert secret not in answers
        assert secret not in log.replace(f"'{TOKENS['score']}'", "")
    for leak in ("host_folder", "root_folder", str(GOLDEN), str(Path.home()), "site-packages"):
        assert leak not in answers, leak
    for text in (answers, log):
        assert "Traceback" not in text
        assert not re.search(r'File "[^"]+", line \d+', text)
    assert "INTERNAL" not in answers


def test_prompts_are_not_logged(server: ServerProcess) -> None:
    row = [17, 23, 29, 31, 37]
    with moorage.connect(server.address, token=TOKENS["admin"]) as admin:
        model = admin.load("llama3", "internal", "llama3")
        admin.forward(model, [row])
        told(admin.forward, model, [[*row, 1 << 30]])
    for seen in (server.log.read_text(), repr(row)[1:-1]):
        assert ("17, 23, 29" in seen) == (seen == repr(row)[1:-1])


def listening(process: int) -> set[str]:
    """The addresses that a process listens on, as the kernel has them."""
    sockets = {os.readlink(entry) for entry in Path(f"/proc/{process}/fd").iterdir()}
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                packed = bytes.fromhex(words[1].split(":")[0])
                turned = b"".join(packed[i : i + 4][::-1] for i in range(0, len(packed), 4))
                found.add(socket.inet_ntop(family, turned).removeprefix("::ffff:"))
    return found


@contextmanager
def default_start(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is told nothing, once no other has its port."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "MOORAGE_CACHE": str(log.parent)}
    command = [sys.executable, "-m", "moorage_server.main"]
    for _ in range(20):
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while process.poll() is None and "serving on" not in log.read_text():
            time.sleep(0.05)
        if process.poll() is None:
            break
        assert "is it in use?" in log.read_text()
        time.sleep(1)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_default_start_listens_on_loopback_only(tmp_path: Path) -> None:
    with default_start(tmp_path / "log") as process:
        assert listening(process.pid) == {"127.0.0.1"}


def test_a_model_with_the_token_for_its_name_is_no_way_to_see_it(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.ServerServiceStub(channel)
        carried = [("authorization", f"Bearer {TOKENS['admin']}")]
        info = stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=carried)
    assert TOKENS["admin"] not in str(info)
