"""Loads and unloads through a server: shared, abandoned, repeated, and down to the byte."""

# ruff: noqa: F401, F811 (fixtures are imported)
import gc
import logging
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import jax
import pytest

import moorage
from conftest import GOLDEN
from engine_double import EngineDouble
from golden_server import bad, client, golden_case, load, server
from moorage_server.engine import local
from server_thread import serving


def live_bytes():
    gc.collect()
    shards = [shard for array in jax.live_arrays() for shard in array.addressable_shards]
    buffers = {(s.device, s.data.unsafe_buffer_pointer()): s.data.nbytes for s in shards}
    return sum(buffers.values())


def test_a_model_comes_and_goes(client):
    before = live_bytes()
    progress = []
    model = load(client, "llama3p2", on_progress=progress.append)
    assert model.state == "ready"
    assert {state.state for state in progress} == {"loading"}
    assert model.config.num_layers == 2
    assert model.path == "llama3p2"
    rows, _, _, _ = golden_case("llama3p2", "plain")
    model.forward(rows)
    found = client.model(model.handle)
    assert (found.forward_count, found.token_count) == (1, 40)
    assert found.last_use_time >= found.load_time
    assert [m for m in client.models() if m.handle == model.handle] == [found]
    assert sum(model.device_bytes.values()) == live_bytes() - before > 0
    assert sorted(model.device_bytes) == [0, 1, 2, 3]
    held = jax.live_arrays()
    assert client.unload(model) == model.device_bytes
    assert live_bytes() == before, f"{len(held)} arrays are freed, whoever holds them"
    assert model.handle not in [m.handle for m in client.models()]
    with pytest.raises(moorage.NotFound) as caught:
        client.model(model.handle)
    assert caught.value.reason == "MODEL_NOT_LOADED"
    again = load(client, "llama3p2")
    assert again.handle == model.handle
    assert client.unload(again) == model.device_bytes


@pytest.fixture
def unlogged():
    """Nothing is logged: pytest keeps tracebacks, whose frames hold arrays."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_a_load_that_fails_leaves_no_array_behind(client, unlogged):
    before, calls = live_bytes(), []

    def fail(*arguments):
        calls.append(1)
        raise RuntimeError("a bug")

    with mock.patch.object(local, "compile_programs", fail), pytest.raises(moorage.InternalError):
        load(client, "llama3p2", dtype="float16")
    assert calls == [1]
    wait_for(lambda: live_bytes() == before)
    client.unload(load(client, "llama3p2", dtype="float16"))


def test_a_load_is_cancelled_while_a_program_is_compiled(client, unlogged):
    before, compiling, done = live_bytes(), threading.Event(), threading.Event()

    def stall(*arguments):
        compiling.set()
        assert done.wait(20)
        return compile_programs(*arguments)

    compile_programs = local.compile_programs
    with mock.patch.object(local, "compile_programs", stall), ThreadPoolExecutor(1) as pool:
        try:
            loading = pool.submit(
                load, client, "llama3p2", dtype="float16", compute_dtype="bfloat16"
            )
            assert compiling.wait(20)
            (model,) = (m for m in client.models() if m.state == "loading")
            begin = time.monotonic()
            assert client.unload(model) == {}
            assert time.monotonic() - begin < 1
            with pytest.raises(moorage.Cancelled) as caught:
                loading.result(20)
            assert caught.value.reason == "LOAD_CANCELLED"
        finally:
            done.set()
    wait_for(lambda: live_bytes() == before)


def test_what_is_loaded_is_not_loaded_again(client, server):
    model = load(client)
    loads = len(server.engine.loads)
    begin = time.monotonic()
    assert load(client).handle == model.handle
    assert time.monotonic() - begin < 0.5
    assert load(client, model_path=str(GOLDEN / "llama3")).handle == model.handle
    assert len(server.engine.loads) == loads


def test_twenty_clients_share_one_load(server):
    loads = len(server.engine.loads)
    everyone = threading.Event()

    def one(_):
        seen = []
        with moorage.connect(server.address) as opened:
            return load(opened, "qwen3_tied", on_progress=seen.append).handle, seen

    server.engine.before_load = lambda: everyone.wait(20)
    try:
        with ThreadPoolExecutor(20) as pool, moorage.connect(server.address) as watcher:
            answers = pool.map(one, range(20))
            wait_for(lambda: waiters(watcher) == 20)
            everyone.set()
            handles, progress = zip(*answers, strict=True)
            watcher.unload(handles[0])
    finally:
        server.engine.before_load = lambda: None
    assert len(set(handles)) == 1
    assert server.engine.loads[loads:] == [handles[0]]
    assert min(len(seen) for seen in progress) >= 1


def waiters(client):
    return sum(m.progress.waiters for m in client.models() if m.progress)


def wait_for(condition, seconds=20.0):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "waited in vain"
        time.sleep(0.02)


WATCHER = """
import sys, moorage
say = lambda progress: print(progress.stages["place"].done, flush=True)
moorage.connect(sys.argv[1]).load("x", source="internal", model_path="llama3", on_progress=say)
"""


def test_a_client_that_is_killed_leaves_the_load():
    engine = EngineDouble()
    engine.hold("place")
    with serving(engine, GOLDEN) as held, moorage.connect(held.address) as opened:
        command = [sys.executable, "-c", WATCHER, held.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "50\n"
            assert waiters(opened) == 1
            process.kill()
        assert process.returncode == -signal.SIGKILL
        wait_for(lambda: waiters(opened) == 0)
        assert [m.state for m in opened.models()] == ["loading"]
        seen = []

        def follow(progress):
            seen.append((progress.stages["place"].done, progress.waiters))
            engine.release()

        model = opened.load("x", "internal", model_path="llama3", on_progress=follow)
        assert seen[0] == (50, 1)
        assert (model.state, engine.count("fetch")) == ("ready", 1)


def test_a_long_load_is_heard_of_every_second():
    engine = EngineDouble()
    engine.hold("place")
    with serving(engine, GOLDEN) as held, moorage.connect(held.address) as opened:
        times = []

        def follow(_):
            times.append(time.monotonic())
            if len(times) == 3:
                engine.release()

        opened.load("x", "internal", model_path="llama3", on_progress=follow)
        assert times[2] - times[0] < 4
