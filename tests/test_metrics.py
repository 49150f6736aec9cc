"""Metrics: the numbers of the rpc, what takes how long, and the table in the documentation."""

import asyncio
import re
from pathlib import Path

import prometheus_client
import pytest

import moorage
from conftest import GOLDEN
from engine_double import EngineDouble
from moorage_server import metrics
from status_server import status_server

DOCS = Path(__file__).parents[1] / "docs" / "operations.md"


@pytest.fixture(scope="module")
def seen():
    """What a busy server says, to Prometheus and by rpc: metrics, info, models and scores.

    One model is ready, leased and was used; one is on its way; one load failed.
    """

    async def run():
        engine = EngineDouble()
        async with (
            status_server(engine, GOLDEN) as server,
            moorage.aio.connect(server.address) as client,
        ):
            model = await client.load("a", "internal", "llama3", lease=60)
            scores = [await model.forward([[1, 2, 3], [4, 5]]) for _ in range(3)]
            with pytest.raises(moorage.NotFound):
                await client.load("b", "internal", "nowhere")
            with pytest.raises(moorage.InvalidRequest):
                await model.forward([[320]])
            engine.failures["place"] = RuntimeError("boom")
            with pytest.raises(moorage.Error):
                await client.load("c", "internal", "gemma2")
            engine.hold("place")
            loading = asyncio.create_task(client.load('d "\\', "internal", "qwen3_moe"))
            await asyncio.to_thread(engine.reached, "place", 3)
            found = await client.info(), await client.models(), await server.metrics()
            engine.release()
            await loading
            return *found, scores

    return asyncio.run(run())


def test_the_numbers_are_those_of_what_was_done(seen):
    _, _, found, _ = seen
    assert {name: found[name] for name in found if name.startswith("moorage_models{")} == {
        'moorage_models{state="QUEUED"}': 0,
        'moorage_models{state="LOADING"}': 1,
        'moorage_models{state="READY"}': 1,
        'moorage_models{state="DRAINING"}': 0,
    }
    assert {name: found[name] for name in found if name.startswith("moorage_loads_total")} == {
        'moorage_loads_total{outcome="READY"}': 1,
        'moorage_loads_total{outcome="INTERNAL"}': 1,
    }
    assert {name: found[name] for name in found if name.startswith("moorage_refusals_total")} == {
        'moorage_refusals_total{reason="CHECKPOINT_NOT_FOUND"}': 1,
        'moorage_refusals_total{reason="TOKEN_OUT_OF_RANGE"}': 1,
        'moorage_refusals_total{reason="INTERNAL"}': 1,
    }
    assert found["moorage_forwards_total"] == 3
    assert found["moorage_tokens_total"] == found["moorage_batch_tokens_total"] == 15
    assert found["moorage_batches_total"] == 3
    assert found["moorage_batch_slots_total"] == 3 * 4 * 128  # two rows run in the bucket of four
    assert found["moorage_leases"] == 1
    assert found["moorage_compiles_after_ready_total"] == 0
    assert found['moorage_device_live_bytes{device="0"}'] == 600
    assert found["moorage_device_reserved_bytes"] == 600 + 600 + 50


def test_the_numbers_are_those_of_the_rpc(seen):
    info, models, found, _ = seen
    activity, memory = info.activity, info.memory
    assert found["moorage_requests"] == activity.requests - 1  # which counts itself
    assert {
        "moorage_forwards_under_way": activity.forwards_under_way,
        "moorage_queued_tokens": activity.queued_tokens,
        "moorage_leases": activity.leases,
        "moorage_forwards_total": activity.forwards,
        "moorage_tokens_total": activity.tokens,
        "moorage_batches_total": activity.batches,
        "moorage_batch_tokens_total": activity.batch_tokens,
        "moorage_batch_slots_total": activity.batch_slots,
        "moorage_compiles_after_ready_total": info.compiles_after_ready,
        "moorage_device_budget_bytes": memory.budget_bytes,
        "moorage_device_reserved_bytes": memory.reserved_bytes,
        "moorage_host_pool_bytes": memory.host_pool_bytes,
        'moorage_limit{name="leases"}': info.limits.leases,
        'moorage_limit{name="queued_tokens"}': info.max_queued_tokens,
        f'moorage_build_info{{platform="cpu",version="{info.version}"}}': 1,
    }.items() <= found.items()
    for model in models:
        labels = f'handle="{model.handle}",model="{model.model_id}"'
        for device, count in model.device_bytes.items():
            name = f'moorage_model_bytes{{device="{device}",{labels}}}'
            assert found[name] == count
        assert found[f"moorage_model_reserved_bytes{{{labels}}}"] == model.reserved_bytes
        assert found[f"moorage_model_leases{{{labels}}}"] == len(model.leases)
        assert found[f"moorage_model_running{{{labels}}}"] == model.running_count
        assert found[f"moorage_model_forwards_total{{{labels}}}"] == model.forward_count
        assert found[f"moorage_model_tokens_total{{{labels}}}"] == model.token_count
    assert [model.forward_count for model in models] == [3, 0]
    assert found["moorage_start_time_seconds"] == pytest.approx(info.start_time.timestamp())


def test_the_stages_of_forward_passes_are_what_their_headers_say(seen):
    _, _, found, scores = seen
    for stage in ("queue", "pad", "execute", "transfer"):
        assert found[f'moorage_forward_seconds_count{{stage="{stage}"}}'] == 3
        told = sum(getattr(score.times, stage) for score in scores)
        assert found[f'moorage_forward_seconds_sum{{stage="{stage}"}}'] == pytest.approx(
            told, abs=1e-8
        )
    assert found['moorage_forward_seconds_sum{stage="pad"}'] > 0


def test_the_stages_of_loads(seen):
    _, _, found, _ = seen
    for stage in ("fetch", "place", "compile", "prove", "whole"):
        assert found[f'moorage_load_seconds_count{{stage="{stage}"}}'] == 1
    for stage in ("fetch", "place"):
        assert found[f'moorage_load_bytes_sum{{stage="{stage}"}}'] == 100
    assert 'moorage_load_bytes_sum{stage="compile"}' not in found


def test_calls_by_method_and_code(seen):
    _, _, found, _ = seen
    calls = {
        tuple(re.findall(r'"(\w+)"', name)[::-1]): value
        for name, value in found.items()
        if name.startswith("moorage_call_seconds_count")
    }
    assert calls == {
        ("LoadModel", "OK"): 1,
        ("LoadModel", "NOT_FOUND"): 1,
        ("LoadModel", "INTERNAL"): 1,
        ("Forward", "OK"): 3,
        ("Forward", "INVALID_ARGUMENT"): 1,
        ("GetServerInfo", "OK"): 1,
        ("ListModels", "OK"): 1,
    }


def test_a_caller_that_leaves_was_cancelled():
    async def run():
        async with (
            status_server(EngineDouble()) as server,
            moorage.aio.connect(server.address) as client,
        ):
            watch = client.watch()
            await anext(watch)
            await watch.aclose()
            while not (await server.metrics()).get(
                'moorage_call_seconds_count{code="CANCELLED",method="WatchModels"}'
            ):
                await asyncio.sleep(0.02)

    asyncio.run(run())


def test_metrics_are_one_servers_own(seen):
    async def run():
        async with status_server(EngineDouble()) as server:
            return await server.metrics()

    assert asyncio.run(run())["moorage_forwards_total"] == 0
    mine = [family.name for family in prometheus_client.REGISTRY.collect()]
    assert not [name for name in mine if name.startswith("moorage")]


def test_the_process_and_the_format():
    async def run():
        async with status_server(EngineDouble()) as server:
            plain = await server.get("/metrics")
            new = await server.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
            return plain, new

    plain, new = asyncio.run(run())
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "\nprocess_resident_memory_bytes " in plain.text
    assert new.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert new.text.endswith("# EOF\n")


def test_the_documentation_has_every_metric(seen):
    _, _, found, _ = seen
    match = re.search(r"<!-- metrics -->\n(.*?)\n<!-- /metrics -->", DOCS.read_text(), re.DOTALL)
    assert match
    assert match[1].strip() == metrics.table()
    documented = set(re.findall(r"^\| `(\w+)` \|", match[1], re.MULTILINE))
    served = {name.partition("{")[0] for name in found if name.startswith("moorage")}
    assert documented == {re.sub(r"_(bucket|count|sum)$", "", name) for name in served}
    units = re.compile(r"_(seconds|bytes|total|info|tokens)$")
    plain = {name for name in documented if not units.search(name)}
    assert plain == {
        "moorage_models",
        "moorage_model_running",
        "moorage_model_leases",
        "moorage_requests",
        "moorage_forwards_under_way",
        "moorage_leases",
        "moorage_limit",
    }
