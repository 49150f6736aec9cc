"""`moorage serve` as a process: it starts, serves, stops, dies and comes back."""

import json
import logging
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import moorage
from conftest import GOLDEN
from moorage import cli
from moorage_server import main
from server_process import server_process, start

#: A trainer's own process, where only the client is installed.
THIN_CLIENT = """
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jax", "jaxlib", "flax", "moorage_models", "moorage_server"}:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
import moorage

with moorage.connect(sys.argv[1]) as client:
    model = client.load("tiny", "internal", "llama3", compute_dtype="float32")
    scores = model.forward(json.loads(sys.argv[2]))
    print(json.dumps([row[1:].tolist() for row in scores.logprobs]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The log and the compiled programs of all servers of this module."""
    return tmp_path_factory.mktemp("server")


def load(client):
    return client.load("tiny", "internal", "llama3", compute_dtype="float32")


def golden_rows():
    with np.load(GOLDEN / "llama3" / "golden.npz") as stored:
        tokens, logprobs = stored["plain/tokens"], stored["plain/logprobs"]
        return tokens.tolist(), logprobs, 3 * float(stored["plain/noise"]) + 2e-5


def test_a_server_that_is_killed_comes_back_the_same(folder):
    rows, expected, tolerance = golden_rows()
    with server_process(GOLDEN, folder) as server, moorage.connect(server.address) as client:
        model = load(client)
        before = model.forward(rows).logprobs
        np.testing.assert_allclose(before, expected, rtol=0, atol=tolerance)
        server.kill()
        with pytest.raises(moorage.Unavailable, match="does not answer"):
            model.forward(rows, timeout=1.0)
        with server_process(GOLDEN, folder, address=server.address) as again:
            wait_for(lambda: client.models() == [], moorage.Unavailable)
            with pytest.raises(moorage.NotFound, match="the same handle"):
                model.forward(rows)
            assert load(client).handle == model.handle
            after = model.forward(rows).logprobs
            assert [row.tobytes() for row in after] == [row.tobytes() for row in before]
            command = [sys.executable, "-c", THIN_CLIENT, again.address, json.dumps(rows)]
            thin = subprocess.run(command, capture_output=True, text=True, check=True)
            np.testing.assert_allclose(
                json.loads(thin.stdout), expected[:, 1:], rtol=0, atol=tolerance
            )
            refuses_a_port_in_use(again.address, folder)
            assert again.stop() == 0
        log = again.log.read_text()
    port = server.address.partition(":")[2]
    assert f"serving on 127.0.0.1:{port}, mesh fsdp=2,tp=2 of cpu" in log
    assert "Traceback" not in log


def refuses_a_port_in_use(address, folder):
    log = folder / "second.log"
    second = start(address, "--mesh", "tp=1", "--compile-cache", folder / "compiled", log=log)
    try:
        assert second.wait(60) == 1
    finally:
        second.kill()
    assert f"moorage serve: cannot listen on {address}: is it in use?" in log.read_text()


def wait_for(condition, *but, seconds=20.0):
    begin = time.monotonic()
    while True:
        try:
            if condition():
                return
        except but:
            pass
        assert time.monotonic() - begin < seconds, "waited in vain"
        time.sleep(0.05)


def test_a_stop_in_mid_load_is_quick_and_who_waits_goes_on_with_the_next_server(tmp_path):
    shutil.copytree(GOLDEN / "llama3", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("128,", "1536,"))
    many = ",".join(f"{rows}x{128 * n}" for rows in (1, 8) for n in range(1, 13))
    with (
        server_process(tmp_path, tmp_path, buckets=many) as server,
        moorage.connect(server.address) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        seen = []
        loading = pool.submit(client.load, "x", "internal", "model", on_progress=seen.append)
        wait_for(lambda: programs(seen) > 0)
        begin = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begin < 8
        assert programs(seen) < seen[-1].stages["compile"].total
        with server_process(tmp_path, tmp_path, address=server.address):
            assert loading.result(60).state == "ready"


def programs(seen):
    """How many programs were compiled, as the last progress has it."""
    return seen[-1].stages["compile"].done if seen and "compile" in seen[-1].stages else 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "fsdp=2,pp=2"], "wanted axes fsdp and tp, as fsdp=2,tp=4"),
        (["--mesh", "tp=0"], "wanted axes fsdp and tp"),
        (["--mesh", "tp"], "wanted axes fsdp and tp"),
        (["--mesh", "fsdp=3,tp=3"], "mesh fsdp=3,tp=3 needs 9 devices, and there are 8"),
        (["--buckets", "3x128"], "rows are a power of two up to 128, lengths multiples of 128"),
        (["--buckets", "1x100"], "rows are a power of two"),
        (["--buckets", "1x0"], "rows are a power of two"),
        (["--buckets", "256x128"], "rows are a power of two"),
        (["--buckets", ""], "rows are a power of two"),
        (["--compile-cache", "/dev/null/x"], "Not a directory"),
        (["--log-level", "loud"], "wanted one of debug, info, warning, error"),
    ],
)
def test_flags_that_cannot_be_served(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's, which the server would remove
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    assert cli.main(["serve", *flags]) == 1
    told = capsys.readouterr().err
    assert re.match("moorage serve: ", told)
    assert message in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--what"], ["--root"], ["--state"]])
def test_flags_that_are_wrong(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(flags)
    assert caught.value.code == 2
    assert "usage: moorage serve" in capsys.readouterr().err
