"""The numbers of a real server, and what it says of itself, by the client and raw stubs."""

# ruff: noqa: F401, F811 (fixtures are imported)
import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import moorage
from golden_server import bad, channel, client, golden_case, load, server
from moorage_server import requests

# The numbers.


@pytest.mark.parametrize("case", ["plain", "right_pad", "left_pad", "long", "packed"])
@pytest.mark.parametrize("name", ["llama3", "gemma3_text_mqa", "qwen3_moe"])
def test_numbers_are_those_of_the_reference(client, name, case):
    rows, segments, expected, tolerance = golden_case(name, case)
    packed = segments if case == "packed" else None
    scores = load(client, name).forward(rows, ["logprobs", "logits"], packed)
    for row in range(len(rows)):
        np.testing.assert_allclose(
            scores.logprobs[row], expected["logprobs"][row], rtol=0, atol=tolerance
        )
        np.testing.assert_allclose(
            scores.logits[row], expected["logits"][row], rtol=0, atol=tolerance
        )
    assert (scores.compute_dtype, scores.dtype) == ("float32", "bfloat16")
    assert scores.semantics == moorage.Semantics(1.0, "float32", "nan", "raw", "isolated")


def test_without_segments_a_packed_row_is_one(client):
    rows, segments, _, _ = golden_case("llama3", "packed")
    model = load(client)
    apart, whole = model.forward(rows, segment_ids=segments), model.forward(rows)
    assert np.isnan(apart.logprobs[0]).sum() == 3
    assert np.isnan(whole.logprobs[0]).sum() == 1


def test_a_reward_model_gives_its_scores_and_no_logprobs(client):
    rows, _, expected, tolerance = golden_case("llama3_reward", "right_pad")
    model = load(client, "llama3_reward")
    last = model.forward(rows, ["score"]).score
    every = model.forward(rows, ["score"], positions=[range(len(row)) for row in rows]).score
    for row in range(len(rows)):
        np.testing.assert_allclose(every[row], expected["scores"][row], rtol=0, atol=tolerance)
        assert last[row].tobytes() == every[row][-1:].tobytes()
    with pytest.raises(moorage.FailedPrecondition, match="are: score, hidden"):
        model.forward(rows)


def test_more_rows_than_a_bucket_holds(client):
    rows, _, expected, tolerance = golden_case("llama3", "right_pad")
    scores = load(client).forward(rows * 7)
    for row in range(21):
        np.testing.assert_allclose(
            scores.logprobs[row], expected["logprobs"][row % 3], rtol=0, atol=tolerance
        )


def test_an_answer_of_many_chunks(client):
    rows, _, expected, tolerance = golden_case("llama3", "long")
    scores = load(client).forward(rows * 20, ["logits"])
    assert sum(row.nbytes for row in scores.logits) > 2 << 20
    for row in range(40):
        np.testing.assert_allclose(
            scores.logits[row], expected["logits"][row % 2], rtol=0, atol=tolerance
        )


def test_a_batch_of_which_the_answer_is_too_large_is_one_call(client, monkeypatch):
    rows, _, _, _ = golden_case("llama3", "long")
    model = load(client)
    whole = model.forward(rows * 3, ["logits"], from_position=1)
    monkeypatch.setattr(requests, "MAX_OUTPUT_BYTES", max(row.nbytes for row in whole.logits))
    cut = model.forward(rows * 3, ["logits"], from_position=1)
    assert len(cut.request_id.split(",")) > 3
    for one, other in zip(whole.logits, cut.logits, strict=True):
        assert one.tobytes() == other.tobytes()


def test_concurrent_passes_give_the_same_bits_as_alone(client):
    rng = np.random.default_rng(7)
    batches = [
        [rng.integers(0, 320, length) for length in rng.integers(1, 128, count)]
        for count in (1, 2, 3, 4, 5, 6, 7, 8)
    ]
    model = load(client)
    alone = [model.forward(rows).logprobs for rows in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda rows: model.forward(rows).logprobs, batches * 4))
    for one, other in zip(alone * 4, together, strict=True):
        assert [row.tobytes() for row in one] == [row.tobytes() for row in other]


def test_the_asyncio_client_gives_the_same(server, client):
    rows, segments, _, _ = golden_case("llama3", "packed")
    model = load(client)
    alone = model.forward(rows, ["logits"], segments)

    async def run():
        async with moorage.aio.connect(server.address) as opened:
            found = await load(opened)
            answers = [found.forward(rows, ["logits"], segments) for _ in range(4)]
            return found.handle, await asyncio.gather(*answers), await opened.models()

    handle, answers, models = asyncio.run(run())
    assert handle == model.handle
    assert handle in [m.handle for m in models]
    for answer in answers:
        for one, other in zip(answer.logits, alone.logits, strict=True):
            assert one.tobytes() == other.tobytes()


# Naming, the server itself, and the standard services.


def test_what_a_name_means(client):
    found = client.resolve("gemma2_2b_it", estimate=True)
    assert (found.model_family, found.loadable, found.checked) == (
        "gemma2",
        True,
        ("name", "preset"),
    )
    assert sorted(found.device_bytes) == [0, 1, 2, 3]
    assert len(client.supported_models()) > 20


def test_what_a_source_holds(client):
    model = load(client)
    found = client.resolve("x", "internal", "llama3", estimate=True)
    assert (found.loadable, found.revision) == (True, model.revision)
    assert found.checked == ("name", "source", "config", "headers")
    assert found.config == model.config
    assert found.device_bytes == model.device_bytes


def test_the_server_describes_itself(client):
    model = load(client)
    info = client.info()
    assert (info.platform, info.mesh) == ("cpu", {"fsdp": 2, "tp": 2})
    assert info.buckets == ((4, 128), (2, 512))
    assert (info.max_message_bytes, info.max_sequence_length) == (4 << 20, 512)
    assert sorted(info.sources) == ["huggingface", "internal", "maxtext"]
    assert info.outputs == (
        "logprobs",
        "entropy",
        "top_k",
        "candidates",
        "logits",
        "score",
        "hidden",
    )
    assert info.compiles_after_ready == 0
    held = {device.id: device.model_bytes for device in info.devices}
    total = dict.fromkeys(range(4), 0)
    for loaded in client.models():
        for number, count in loaded.device_bytes.items():
            total[number] += count
    assert held == total
    assert all(held[number] >= count for number, count in model.device_bytes.items())


def test_health(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    serving_now = health_pb2.HealthCheckResponse(status="SERVING")
    assert stub.Check(health_pb2.HealthCheckRequest()) == serving_now
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert next(watch) == serving_now
    watch.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert sorted(database.get_services()) == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "moorage.v1.ModelService",
        "moorage.v1.NamingService",
        "moorage.v1.ScoringService",
        "moorage.v1.ServerService",
    ]
    file = database.FindFileContainingSymbol("moorage.v1.ScoringService")
    assert [method.name for method in file.service[2].method] == ["Forward"]
