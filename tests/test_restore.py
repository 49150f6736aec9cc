"""A server that was killed comes back with what it had: models, handles, leases, bits."""

import asyncio
import json
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import moorage
from cache_scenario import forward, load, reached, refusal, settle, wanted
from conftest import GOLDEN
from engine_double import EngineDouble
from moorage_models.checkpoint import open_checkpoint
from moorage_models.sources import ModelRequest, ModelSource, Policy
from moorage_server import looks as looks_module
from moorage_server import scoring_service
from moorage_server.cache import ModelCache
from moorage_server.errors import ServerError
from moorage_server.journal import Entry, Journal
from moorage_server.leases import Lease
from server_process import server_process

REQUEST = ModelRequest("x", ModelSource.GCS, "gs://b/x", "rev", options=(("a", "1"),))
LEASE = Lease("0" * 32, "h", "run 1", 60.0, 1050.0)


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "state" / "models.json")


def test_a_journal_gives_back_what_was_written(journal):
    assert journal.read(0.0) == ([], [])
    journal.write([Entry("h", REQUEST)], [LEASE], now=1000.0)
    entries, leases = journal.read(now=5.0)
    assert entries == [Entry("h", REQUEST)]
    assert leases == [replace(LEASE, expires=55.0)]  # what it had left, from now on
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    assert [path.name for path in journal.path.parent.iterdir()] == ["models.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "models": [{}]}']
)
def test_a_journal_that_cannot_be_read_is_passed_over(journal, text, caplog):
    journal.path.parent.mkdir()
    journal.path.write_text(text)
    assert journal.read(0.0) == ([], [])
    assert "is passed over" in caplog.text


def test_a_journal_that_cannot_be_written_does_no_harm(journal, caplog):
    journal.path.parent.write_text("a file")
    journal.write([], [], 0.0)
    assert "the journal cannot be written" in caplog.text


def run(body):
    return asyncio.run(asyncio.wait_for(body(), 20))


def lost(cache):
    with pytest.raises(ServerError) as caught:
        cache.renew(LEASE.id)
    assert caught.value.reason == "LEASE_UNKNOWN"
    return caught.value


async def when_ready(cache, handle):
    assert await cache.restored(handle)
    return cache.ready(handle)


def handles(journal):
    return [entry["handle"] for entry in json.loads(journal.path.read_text())["models"]]


def test_the_journal_follows_what_is_loaded(journal):
    async def body():
        cache = ModelCache(EngineDouble(), Policy(), journal=journal)
        first, second = await load(cache), await load(cache, wanted("gemma2"))
        assert handles(journal) == [first.handle, second.handle]
        await cache.unload(first.handle)
        assert handles(journal) == [second.handle]
        lease = cache.lease(second, "me", 60.0)
        assert journal.read(0.0)[1][0].id == lease.id
        cache.release(lease.id)
        assert journal.read(0.0)[1] == []

    run(body)


def test_a_forward_waits_for_a_model_that_is_being_restored(journal):
    async def body():
        engine = EngineDouble()
        before = ModelCache(engine, Policy(), journal=journal)
        model = await load(before)
        lease = before.lease(model, "me", 60.0)

        engine = EngineDouble()
        cache = ModelCache(engine, Policy(), journal=journal)
        engine.hold("place")
        cache.restore()
        with mock.patch.object(scoring_service, "_HEARTBEAT_SECONDS", 0.02):
            asked = asyncio.create_task(forward(cache, engine, model))
            await reached(engine, "place")
            await asyncio.sleep(0.1)
            assert not asked.done()
            assert handles(journal) == [model.handle]  # as long as it is not ready, too
            engine.release("place")
            parts = await asked
        assert [part.WhichOneof("part") for part in parts[-2:]] == ["header", "chunk"]
        assert {part.progress.rows for part in parts[:-2]} == {1}  # signs of life
        assert cache.renew(lease.id).client == "me"
        assert [held.id for held in cache.leases.of(model.handle)] == [lease.id]

    run(body)


def test_a_model_that_cannot_be_restored_is_forgotten(journal):
    async def body():
        journal.write([Entry("gone", wanted("nothing"))], [replace(LEASE, handle="gone")], 0.0)
        cache = ModelCache(EngineDouble(), Policy(), journal=journal)
        cache.restore()
        assert await refusal(when_ready(cache, "gone")) == "MODEL_NOT_LOADED"
        assert handles(journal) == []
        told = lost(cache)
        assert "load the model again" in told.message
        assert told.details == {}  # nobody unloaded it: its holder takes a new lease

    run(body)


def test_a_model_whose_files_have_changed_is_another_model(journal):
    async def body():
        journal.write([Entry("before", wanted())], [replace(LEASE, handle="before")], 0.0)
        cache = ModelCache(EngineDouble(), Policy(), journal=journal)
        cache.restore()
        assert await refusal(when_ready(cache, "before")) == "MODEL_NOT_LOADED"
        assert not cache.is_restoring
        (model,) = cache.models()
        await model.load
        assert handles(journal) == [model.handle] != ["before"]
        assert lost(cache).details == {}

    run(body)


def test_a_server_that_is_stopped_while_it_restores_forgets_nothing(journal):
    async def body():
        before = ModelCache(EngineDouble(), Policy(), journal=journal)
        model = await load(before)
        engine = EngineDouble()
        cache = ModelCache(engine, Policy(), journal=journal)
        engine.hold("place")
        cache.restore()
        await reached(engine, "place")
        cache.stop()
        assert await refusal(when_ready(cache, model.handle)) == "MODEL_NOT_LOADED"
        assert handles(journal) == [model.handle]

    run(body)


def test_what_is_restored_has_its_memory_before_what_is_asked_for_now(journal):
    async def body():
        model = await load(ModelCache(EngineDouble(), Policy(), journal=journal))
        asked, found = threading.Event(), threading.Event()

        def look(request, *arguments, **options):
            if request.model_id == "llama3":
                asked.set()
                assert found.wait(20)
            return open_checkpoint(request, *arguments, **options)

        engine = EngineDouble(room=1)
        cache = ModelCache(engine, Policy(), journal=journal)
        engine.hold("place")
        with mock.patch.object(looks_module, "open_checkpoint", look):
            cache.restore()
            await asyncio.to_thread(asked.wait, 20)
            other = asyncio.create_task(load(cache, wanted("gemma2")))
            await settle()
            assert cache.models() == []
            found.set()
            assert await refusal(other) == "DEVICE_BUDGET_EXCEEDED"
        engine.release("place")
        assert await when_ready(cache, model.handle)

    run(body)


def test_a_killed_server_comes_back_with_what_it_had(tmp_path: Path):
    flags = ("--state", str(tmp_path / "state"), "--restore")
    rows = [[1, 5, 9, 4], [7, 2]]
    with server_process(GOLDEN, tmp_path, *flags) as server:
        with moorage.connect(server.address) as client:
            model = client.load("x", "internal", "llama3")
            before = client.forward(model, rows)
        server.kill()
        begin = time.monotonic()
        with (
            server_process(GOLDEN, tmp_path, *flags, address=server.address) as again,
            moorage.connect(again.address) as client,
        ):
            after = client.forward(model.handle, rows)
            assert time.monotonic() - begin < 60
            for one, other in zip(before.logprobs, after.logprobs, strict=True):
                assert np.array_equal(one, other, equal_nan=True)
            (found,) = client.models()
            assert (found.handle, found.revision) == (model.handle, model.revision)


def test_restore_wants_a_state_folder(tmp_path, capsys):
    from moorage_server.main import main

    assert main(["--restore", "--compile-cache", str(tmp_path)]) == 1
    assert "restore needs state" in capsys.readouterr().err
