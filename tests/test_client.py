"""Both clients against a server in this process that answers by script."""

import asyncio
import pickle
import re
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

import moorage
from moorage import errors, requests, transport
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc

ROOT = Path(__file__).parent.parent
ROWS = [[2, 651, 5277], [2, 1841]]
NAN = float("nan")
LOGPROBS = np.array([NAN, -1.5, -0.25, NAN, -3.0], np.float32)
CONFIG = pb.ConfigSummary(family="gemma2", num_layers=26, num_parameters=2_614_341_888)
MODEL = pb.Model(
    handle="a1b2",
    state=pb.MODEL_STATE_READY,
    name=pb.ModelName(model_id="google/gemma-2-2b", model_config_id="gemma2_2b"),
    spec=pb.ModelSpec(model_id="google/gemma-2-2b", source=pb.MODEL_SOURCE_KAGGLE),
    revision="c5ebcd4",
    path="google/gemma-2/flax/gemma2-2b",
    config=CONFIG,
    dtype="bfloat16",
    compute_dtype="float32",
    device_bytes=[pb.DeviceBytes(device_id=0, bytes=3 << 30), pb.DeviceBytes(device_id=1, bytes=7)],
    forward_count=4,
    token_count=99,
)
MODEL.load_time.FromDatetime(datetime(2026, 1, 2, 3, 4, 5))
MODEL.load_duration.FromMilliseconds(12_500)


@dataclass
class Fake:
    """A server; the requests that it saw."""

    address: str
    server: grpc.Server
    requests: list[Any] = field(default_factory=list)


@contextmanager
def serving(port: int = 0, **script: Callable[..., Any]) -> Iterator[Fake]:
    """Serves one function of (request, context) for each method."""
    server = grpc.server(ThreadPoolExecutor(8))
    fake = Fake("", server)

    def play(answer):
        def method(request, context):
            fake.requests.append(request)
            return answer(request, context)

        return method

    for service in ("Naming", "Model", "Scoring", "Server"):
        servicer = getattr(pb_grpc, f"{service}ServiceServicer")()
        for name, answer in script.items():
            setattr(servicer, name, play(answer))
        getattr(pb_grpc, f"add_{service}ServiceServicer_to_server")(servicer, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    yield fake
    server.stop(0).wait()


def fail(context, code, message, reason=None, domain="moorage", details=None, retry=None):
    """Ends a call as the real server does: with an ErrorInfo, and perhaps a RetryInfo."""
    attached = []
    if reason is not None:
        attached.append(error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=details))
    if retry is not None:
        attached.append(error_details_pb2.RetryInfo())
        attached[-1].retry_delay.FromMilliseconds(int(retry * 1000))
    status = status_pb2.Status(code=code.value[0], message=message)
    for message_ in attached:
        wrapped = AnyMessage()
        wrapped.Pack(message_)
        status.details.append(wrapped)
    context.abort_with_status(rpc_status.to_status(status))


def progress(done: int, total: int, waiters: int = 1) -> pb.LoadModelResponse:
    stages = [pb.StageProgress(stage="place", done=done, total=total, rate=8.0)]
    message = pb.LoadProgress(state=pb.MODEL_STATE_LOADING, stages=stages, waiters=waiters)
    message.elapsed.FromMilliseconds(1500)
    return pb.LoadModelResponse(progress=message)


def load_model(request, context):
    yield progress(50, 200)
    yield progress(200, 200, waiters=3)
    yield pb.LoadModelResponse(model=MODEL)


def parts(
    handle: str = "a1b2",
    chunk: int = 8,
    lengths: Sequence[int] = (3, 2),
    **tensors: np.ndarray,
) -> list[pb.ForwardResponse]:
    """The messages of a right answer, in chunks of a few bytes."""
    header = pb.ForwardHeader(
        handle=handle,
        model_id="google/gemma-2-2b",
        revision="c5ebcd4",
        dtype="bfloat16",
        compute_dtype="float32",
        semantics=pb.Semantics(
            temperature=1.0,
            head_dtype="float32",
            first_token=pb.FIRST_TOKEN_NAN,
            logit_scale=pb.LOGIT_SCALE_RAW,
            segments=pb.SEGMENT_MODE_ISOLATED,
        ),
        weights_digest="hub:77",
        weights_version=1,
        mesh=[pb.MeshAxis(name="fsdp", size=2), pb.MeshAxis(name="tp", size=4)],
        buckets=[pb.Bucket(rows=2, length=128)],
        request_id="r1",
        server_version="0.1.0",
    )
    header.queue_time.FromMilliseconds(250)
    header.pad_time.FromMilliseconds(500)
    header.execute_time.FromMilliseconds(1750)
    header.transfer_time.FromMilliseconds(125)
    answer = [pb.ForwardResponse(header=header)]
    for index, (name, values) in enumerate(tensors.items()):
        answer[0].header.tensors.add(
            name=name, dtype=values.dtype.name, shape=values.shape, row_lengths=lengths
        )
        data = values.tobytes()
        for offset in range(0, len(data), chunk):
            piece = data[offset : offset + chunk]
            crc = google_crc32c.value(piece)
            message = pb.TensorChunk(tensor=index, offset=offset, crc32c=crc, data=piece)
            answer.append(pb.ForwardResponse(chunk=message))
    return answer


def forward(request, context):
    return iter(parts(request.handle, logprobs=LOGPROBS))


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request):
    """Calls one method of a new client, in either kind."""

    def blocking(address, method, *arguments, timeout=20.0, **options):
        with moorage.connect(address, timeout=timeout) as client:
            return getattr(client, method)(*arguments, **options)

    def awaiting(address, method, *arguments, timeout=20.0, **options):
        async def run():
            async with moorage.aio.connect(address, timeout=timeout) as client:
                return await getattr(client, method)(*arguments, **options)

        return asyncio.run(run())

    return blocking if request.param == "blocking" else awaiting


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(transport, "FIRST_PAUSE", 0.001)


# Naming, models and the server.


def test_resolve(ask):
    name = pb.ModelName(model_id="gemma2_2b", model_name="gemma-2-2b", model_config_id="gemma2_2b")
    response = pb.ResolveNameResponse(
        name=name,
        checked=["name", "preset"],
        loadable=True,
        config=CONFIG,
        device_bytes=[pb.DeviceBytes(device_id=3, bytes=12)],
        budget=pb.BudgetEstimate(needed_bytes=20, free_bytes=15, fits=True, evicted=["c3", "d4"]),
    )
    with serving(ResolveName=lambda *_: response) as fake:
        found = ask(fake.address, "resolve", "gemma2_2b", estimate=True)
    assert fake.requests == [
        pb.ResolveNameRequest(model=pb.ModelSpec(model_id="gemma2_2b"), estimate=True)
    ]
    assert (found.model_name, found.model_config_id, found.model_family) == (
        "gemma-2-2b",
        "gemma2_2b",
        "",
    )
    assert found.checked == ("name", "preset")
    assert found.loadable
    assert found.config.num_parameters == 2_614_341_888
    assert found.device_bytes == {3: 12}
    assert found.budget == moorage.BudgetEstimate(20, 15, True, ("c3", "d4"))


@pytest.mark.parametrize(
    ("options", "checks"),
    [
        ({"source": "GCS", "model_path": "gs://b/p"}, True),
        ({"source": "gcs", "check_source": False}, False),
        ({"check_source": True}, True),
        ({"revision": "main"}, False),
    ],
)
def test_resolve_looks_into_a_source_that_is_named(ask, options, checks):
    with serving(ResolveName=lambda *_: pb.ResolveNameResponse()) as fake:
        found = ask(fake.address, "resolve", "gemma2_2b", **options)
    assert (found.config, found.budget) == (None, None)
    assert fake.requests[0].check_source is checks


@pytest.mark.parametrize(
    ("source", "number"),
    [("huggingface", 1), ("Kaggle", 2), ("GCS", 3), ("internal", 4), ("MaxText", 5)],
)
def test_sources_go_by_name(source, number):
    assert requests.spec("id", source).source == number


def test_supported_models(ask):
    preset = pb.SupportedModel(
        model_config_id="gemma2_2b", model_config_category="gemma", config=CONFIG
    )
    response = pb.ListSupportedModelsResponse(models=[preset])
    with serving(ListSupportedModels=lambda *_: response) as fake:
        (found,) = ask(fake.address, "supported_models")
    assert (found.model_config_id, found.config.num_layers) == ("gemma2_2b", 26)


def test_models(ask):
    response = pb.ListModelsResponse(models=[MODEL, pb.Model(state=99, progress={"waiters": 2})])
    with serving(ListModels=lambda *_: response) as fake:
        ready, odd = ask(fake.address, "models")
    assert (ready.handle, ready.state, ready.source) == ("a1b2", "ready", "kaggle")
    assert ready.device_bytes == {0: 3221225472, 1: 7}
    assert ready.load_time == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert (ready.load_seconds, ready.last_use_time, ready.progress) == (12.5, None, None)
    assert (odd.state, odd.progress.waiters) == ("99", 2)


def test_what_a_model_has_been_through_and_who_holds_it(ask):
    model = pb.Model(running_count=2, reserved_bytes=123)
    for second, state in ((5, pb.MODEL_STATE_QUEUED), (7, pb.MODEL_STATE_READY)):
        model.history.add(state=state).time.FromDatetime(datetime(2026, 1, 2, 3, 4, second))
    lease = model.leases.add(client="run 7")
    lease.duration.FromMilliseconds(60_500)
    lease.time_left.FromMilliseconds(1_250)
    with serving(GetModel=lambda *_: pb.GetModelResponse(model=model)) as fake:
        found = ask(fake.address, "model", "a1b2")
    assert list(found.history.items()) == [
        ("queued", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("ready", datetime(2026, 1, 2, 3, 4, 7, tzinfo=UTC)),
    ]
    assert found.leases == (moorage.Lease("", "run 7", 60.5, 1.25),)
    assert (found.running_count, found.reserved_bytes) == (2, 123)
    assert found.lease is None  # this client holds none


def test_model_and_unload_by_handle(ask):
    freed = pb.UnloadModelResponse(device_bytes=[pb.DeviceBytes(device_id=0, bytes=64)])
    with serving(
        GetModel=lambda *_: pb.GetModelResponse(model=MODEL), UnloadModel=lambda *_: freed
    ) as fake:
        model = ask(fake.address, "model", "a1b2")
        assert ask(fake.address, "unload", model) == {0: 64}
        assert ask(fake.address, "unload", "c3") == {0: 64}
    assert [request.handle for request in fake.requests] == ["a1b2", "a1b2", "c3"]


def test_info(ask):
    response = pb.GetServerInfoResponse(
        version="0.1.0",
        platform="cpu",
        devices=[pb.Device(id=0, kind="cpu", model_bytes=5)],
        mesh=[pb.MeshAxis(name="fsdp", size=1), pb.MeshAxis(name="tp", size=8)],
        buckets=[pb.Bucket(rows=4, length=512)],
        limits=pb.Limits(
            max_message_bytes=1,
            max_sequence_length=2,
            max_output_bytes=3,
            max_queued_tokens=4,
            answer_retention={"seconds": 60},
            max_retained_bytes=5,
            max_waiting_bytes=6,
        ),
        sources=[pb.MODEL_SOURCE_GCS],
        outputs=["logprobs"],
        memory=pb.Memory(
            budget_bytes=100,
            reserved_bytes=60,
            live_bytes=[pb.DeviceBytes(device_id=0, bytes=55)],
            host_pool_bytes=7,
        ),
        profiles=[pb.OutputProfile(outputs=["logprobs", "top_k"], size=32)],
        compiles_after_ready=6,
    )
    with serving(GetServerInfo=lambda *_: response) as fake:
        info = ask(fake.address, "info")
    assert info.devices == (moorage.Device(0, "cpu", 5),)
    assert list(info.mesh.items()) == [("fsdp", 1), ("tp", 8)]
    assert info.buckets == ((4, 512),)
    assert (info.max_message_bytes, info.max_sequence_length, info.max_output_bytes) == (1, 2, 3)
    assert (info.max_queued_tokens, info.max_retained_bytes, info.max_waiting_bytes) == (4, 5, 6)
    assert info.answer_retention_seconds == 60
    assert info.profiles == (moorage.OutputProfile(("logprobs", "top_k"), 32),)
    assert info.compiles_after_ready == 6
    assert info.memory == moorage.Memory(100, 60, {0: 55}, 7)
    assert (info.sources, info.outputs, info.start_time) == (("gcs",), ("logprobs",), None)


# Loading.


def test_load_reports_progress_and_gives_the_model(ask, capsys):
    seen = []
    with serving(LoadModel=load_model) as fake:
        model = ask(
            fake.address,
            "load",
            "google/gemma-2-2b",
            "kaggle",
            "google/gemma-2/flax/gemma2-2b",
            download_path="/data",
            compute_dtype="float32",
            on_progress=seen.append,
        )
    assert seen == [
        moorage.LoadProgress("loading", {"place": moorage.Stage(50, 200, 8.0)}, 1, 1.5),
        moorage.LoadProgress("loading", {"place": moorage.Stage(200, 200, 8.0)}, 3, 1.5),
    ]
    assert (model.handle, model.model_config_id, model.dtype) == ("a1b2", "gemma2_2b", "bfloat16")
    assert fake.requests[0].model == pb.ModelSpec(
        model_id="google/gemma-2-2b",
        source=pb.MODEL_SOURCE_KAGGLE,
        model_path="google/gemma-2/flax/gemma2-2b",
        model_download_path="/data",
        compute_dtype="float32",
    )
    assert capsys.readouterr().err == ""  # no terminal, no bar


def test_load_draws_a_bar(ask, capsys):
    with serving(LoadModel=load_model) as fake:
        ask(fake.address, "load", "google/gemma-2-2b", progress=True)
    drawn = capsys.readouterr().err
    assert "google/gemma-2-2b" in drawn
    assert "loading, 3 waiting" in drawn
    assert "200/200" in drawn


def test_load_resumes_after_a_break(ask, quick):
    answers = [False, False, True]

    def breaking(request, context):
        yield progress(50, 200)
        if not answers.pop(0):
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        yield pb.LoadModelResponse(model=MODEL)

    with serving(LoadModel=breaking) as fake:
        assert ask(fake.address, "load", "google/gemma-2-2b").handle == "a1b2"
    first, second, third = fake.requests
    assert first == second == third


def test_load_outlives_a_restart_of_the_server(ask, quick):
    released = threading.Event()
    restarted = []

    def hanging(request, context):
        yield progress(50, 200)
        released.wait(10)

    def restart(_):
        if not restarted:
            first.server.stop(0).wait()
            released.set()
            port = int(first.address.rpartition(":")[2])
            restarted.append(serving(port, LoadModel=load_model))
            restarted[0].__enter__()

    with serving(LoadModel=hanging) as first:
        model = ask(first.address, "load", "google/gemma-2-2b", on_progress=restart)
    restarted[0].__exit__(None, None, None)
    assert model.handle == "a1b2"


def test_load_gives_up_after_five_breaks_with_answers_between(ask, quick):
    def breaking(request, context):
        yield progress(50, 200)
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    with serving(LoadModel=breaking) as fake, pytest.raises(moorage.Unavailable):
        ask(fake.address, "load", "google/gemma-2-2b")
    assert len(fake.requests) == 6


@pytest.mark.parametrize("answered", [False, True])
def test_load_does_not_resume_what_the_server_refused(ask, quick, answered):
    def refusing(request, context):
        if answered:
            yield progress(50, 200)
        reason = "SERVER_DRAINING" if answered else None
        fail(context, grpc.StatusCode.UNAVAILABLE, "stopping", reason)

    with serving(LoadModel=refusing) as fake, pytest.raises(moorage.Unavailable):
        ask(fake.address, "load", "google/gemma-2-2b")
    assert len(fake.requests) == 1


def test_load_that_ends_without_a_model_is_an_error(ask):
    with (
        serving(LoadModel=lambda *_: iter([progress(1, 2)])) as fake,
        pytest.raises(moorage.InternalError, match="without a model"),
    ):
        ask(fake.address, "load", "google/gemma-2-2b")


# Forward passes.


def test_forward(ask):
    with serving(Forward=forward) as fake:
        found = ask(fake.address, "forward", "a1b2", ROWS)
    (request,) = fake.requests
    assert re.fullmatch("[0-9a-f]{32}", request.request_id)
    request.ClearField("request_id")
    assert request == pb.ForwardRequest(
        handle="a1b2",
        token_ids=[2, 651, 5277, 2, 1841],
        row_lengths=[3, 2],
        outputs=pb.OutputSpec(names=["logprobs"]),
        semantics=pb.Semantics(temperature=1.0, first_token=1, logit_scale=1),
    )
    first, second = found.logprobs
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_array_equal(first, [NAN, -1.5, -0.25])
    np.testing.assert_array_equal(second, [NAN, -3.0])
    assert list(found.tensors) == ["logprobs"]
    assert found.logits is None


def test_scores_say_where_they_come_from(ask):
    with serving(Forward=forward) as fake:
        found = ask(fake.address, "forward", "a1b2", ROWS)
    facts = {f.name: getattr(found, f.name) for f in fields(found) if f.name != "tensors"}
    assert facts == {
        "handle": "a1b2",
        "model_id": "google/gemma-2-2b",
        "revision": "c5ebcd4",
        "dtype": "bfloat16",
        "compute_dtype": "float32",
        "weights_digest": "hub:77",
        "weights_version": 1,
        "mesh": {"fsdp": 2, "tp": 4},
        "buckets": ((2, 128),),
        "server_version": "0.1.0",
        "request_id": "r1",
        "semantics": moorage.Semantics(1.0, "float32", "nan", "raw", "isolated"),
        "times": moorage.Times(queue=0.25, pad=0.5, execute=1.75, transfer=0.125),
    }


def test_forward_through_the_model():
    logits = np.arange(20, dtype=np.float32).reshape(5, 4)
    answer = parts(logits=logits, logprobs=LOGPROBS)

    async def run(address):
        async with moorage.aio.connect(address) as client:
            model = await client.load("google/gemma-2-2b")
            task = asyncio.create_task(model.forward(ROWS, ["logprobs", "logits"]))
            return await task

    with serving(LoadModel=load_model, Forward=lambda *_: iter(answer)) as fake:
        with moorage.connect(fake.address) as client:
            model = client.load("google/gemma-2-2b")
            blocking = model.forward(ROWS, ["logprobs", "logits"])
            future = model.forward_async(ROWS, ["logprobs", "logits"])
            later = future.result(10)
        awaited = asyncio.run(run(fake.address))
    for found in (blocking, later, awaited):
        assert [row.shape for row in found.logits] == [(3, 4), (2, 4)]
        np.testing.assert_array_equal(found.logits[1], [[12, 13, 14, 15], [16, 17, 18, 19]])
        np.testing.assert_array_equal(found.logprobs[0], [NAN, -1.5, -0.25])


def test_every_output_has_its_name(ask):
    tensors = {
        "logprobs": LOGPROBS,
        "entropy": np.arange(5, dtype=np.float32),
        "top_k_ids": np.arange(10, dtype=np.int32).reshape(5, 2),
        "top_k_logprobs": -np.arange(10, dtype=np.float32).reshape(5, 2),
        "candidates": np.ones((5, 3), np.float32),
        "logits": np.zeros((5, 7), np.float32),
        "hidden": np.full((5, 4), 2, np.float32),
        "made_later": np.full(5, 3, np.int32),
    }
    with serving(Forward=lambda *_: iter(parts(**tensors))) as fake:
        found = ask(
            fake.address,
            "forward",
            "a1b2",
            ROWS,
            ("logprobs", "entropy", "logits", "hidden", "made_later"),
            top_k=2,
            candidates=[4, 5, 6],
        )
    assert fake.requests[0].outputs.names[-2:] == ["top_k", "candidates"]
    for name, values in tensors.items():
        arrays = found.tensors[name]
        assert getattr(found, name, arrays) is arrays
        assert [len(array) for array in arrays] == [3, 2]
        np.testing.assert_array_equal(np.concatenate(arrays), values)
        assert arrays[0].dtype == values.dtype
    assert found.score is None


def test_an_output_of_other_positions_is_cut_into_its_own_rows(ask):
    answer = parts(logprobs=LOGPROBS[1:3], lengths=(2, 0))
    answer[0].header.tensors[0].row_lengths[:] = [2, 0]
    with serving(Forward=lambda *_: iter(answer)) as fake:
        found = ask(fake.address, "forward", "a1b2", ROWS, from_position=[1, 2])
    np.testing.assert_array_equal(found.logprobs[0], [-1.5, -0.25])
    assert found.logprobs[1].shape == (0,)


def test_arrays_are_views_of_one_buffer(ask):
    with serving(Forward=forward) as fake:
        first, second = ask(fake.address, "forward", "a1b2", ROWS).logprobs
    assert first.base is second.base is not None


WRONG_ROWS = [
    ("none", None),
    ("no row", []),
    ("empty row", [[1], []]),
    ("flat", [1, 2]),
    ("number", 5),
    ("text", "abc"),
    ("texts", [["a"]]),
    ("floats", [[1.0, 2.0]]),
    ("float array", np.ones((2, 2))),
    ("booleans", [[True, False]]),
    ("nones", [[None]]),
    ("nested", [[1, [2]]]),
    ("deep", [[[1]]]),
    ("three axes", np.ones((2, 2, 2), int)),
    ("too large", [[2**31]]),
    ("too small", [[-(2**31) - 1]]),
    ("unsigned", np.array([[2**32]], np.uint64)),
    ("enormous", [[2**70]]),
]


@pytest.mark.parametrize("rows", [row for _, row in WRONG_ROWS], ids=[i for i, _ in WRONG_ROWS])
def test_wrong_rows_are_refused_before_they_are_sent(ask, rows):
    with serving(Forward=forward) as fake, pytest.raises(moorage.InvalidRequest) as caught:
        ask(fake.address, "forward", "a1b2", rows)
    assert fake.requests == []
    assert "rows" in caught.value.message


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("forward", ("a1b2", ROWS, ["logprobs"], [[1, 1], [1, 1, 1]]), "one id for each token"),
        ("load", ("gemma2_2b", "s3"), "huggingface, kaggle, gcs, internal, maxtext"),
        ("load", (5,), "strings"),
    ],
)
def test_other_wrong_values_are_refused(ask, method, arguments, message):
    with pytest.raises(moorage.InvalidRequest, match=message):
        ask("127.0.0.1:1", method, *arguments)


PROGRESS = pb.ForwardResponse(progress=pb.ForwardProgress(rows=2))


def _flip(answer):
    data = answer[1].chunk.data
    answer[1].chunk.data = bytes([data[0] ^ 1]) + data[1:]


def _reshape(answer):
    answer[0].header.tensors[0].shape[:] = [4]


def _negate(answer):
    tensor = answer[0].header.tensors[0]
    tensor.row_lengths[:], tensor.shape[:] = [-1, 2], [1]
    del answer[2:]
    answer[1].chunk.data = answer[1].chunk.data[:4]
    answer[1].chunk.crc32c = google_crc32c.value(answer[1].chunk.data)


def _empty(answer):
    answer[0].header.ClearField("tensors")
    del answer[1:]


DAMAGES = {
    "a flipped bit": _flip,
    "no message": lambda answer: answer.clear(),
    "no header": lambda answer: answer.pop(0),
    "no first chunk": lambda answer: answer.pop(1),
    "no middle chunk": lambda answer: answer.pop(2),
    "no last chunk": lambda answer: answer.pop(),
    "no chunk": lambda answer: answer.__delitem__(slice(1, None)),
    "swapped chunks": lambda answer: answer.insert(1, answer.pop(2)),
    "a chunk twice": lambda answer: answer.insert(2, answer[1]),
    "a chunk too many": lambda answer: answer.append(answer[1]),
    "a second header": lambda answer: answer.insert(1, answer[0]),
    "an unknown message": lambda answer: answer.append(pb.ForwardResponse()),
    "a chunk of no tensor": lambda answer: setattr(answer[1].chunk, "tensor", 1),
    "another model": lambda answer: setattr(answer[0].header, "handle", "zz"),
    "another output": lambda answer: setattr(answer[0].header.tensors[0], "name", "logits"),
    "other rows": lambda answer: answer[0].header.tensors[0].row_lengths.reverse(),
    "a row too many": lambda answer: answer[0].header.tensors[0].row_lengths.append(0),
    "a negative row": _negate,
    "a negative axis": lambda answer: answer[0].header.tensors[0].shape.append(-1),
    "an axis too large": lambda answer: answer[0].header.tensors[0].shape.append(1 << 60),
    "a name twice": lambda answer: answer[0].header.tensors.append(answer[0].header.tensors[0]),
    "a chunk before its time": lambda answer: setattr(answer[1].chunk, "offset", -8),
    "a chunk too long": lambda answer: setattr(answer[3].chunk, "data", b"12345"),
    "progress after the header": lambda answer: answer.insert(1, PROGRESS),
    "another shape": _reshape,
    "no tensor": _empty,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_answers_are_never_given(ask, damage):
    answer = parts(logprobs=LOGPROBS)
    damage(answer)
    with serving(Forward=lambda *_: iter(answer)) as fake, pytest.raises(moorage.DataLoss):
        ask(fake.address, "forward", "a1b2", ROWS)
    assert len(fake.requests) == (4 if damage is _flip else 1)


def test_a_dtype_that_is_not_known_is_named(ask):
    answer = parts(logprobs=LOGPROBS.astype(np.float16))
    message = "logprobs is float16; this client reads float32, int32"
    with (
        serving(Forward=lambda *_: iter(answer)) as fake,
        pytest.raises(moorage.Unsupported, match=message),
    ):
        ask(fake.address, "forward", "a1b2", ROWS)


def test_progress_may_come_before_the_header(ask):
    with serving(Forward=lambda *_: iter([PROGRESS, PROGRESS, *parts(logprobs=LOGPROBS)])) as fake:
        found = ask(fake.address, "forward", "a1b2", ROWS)
    np.testing.assert_array_equal(found.logprobs[1], [NAN, -3.0])


# Errors.

EXCEPTIONS = {
    "INVALID_ARGUMENT": moorage.InvalidRequest,
    "NOT_FOUND": moorage.NotFound,
    "PERMISSION_DENIED": moorage.PermissionDenied,
    "UNAUTHENTICATED": moorage.Unauthenticated,
    "UNAVAILABLE": moorage.Unavailable,
    "RESOURCE_EXHAUSTED": moorage.ResourceExhausted,
    "FAILED_PRECONDITION": moorage.FailedPrecondition,
    "UNIMPLEMENTED": moorage.Unsupported,
    "DATA_LOSS": moorage.DataLoss,
    "CANCELLED": moorage.Cancelled,
    "DEADLINE_EXCEEDED": moorage.DeadlineExceeded,
    "INTERNAL": moorage.InternalError,
}

# The wire's own comments say which code each reason has.
PROTO = (ROOT / "proto/moorage/v1/moorage.proto").read_text()
REASONS = re.findall(r"// ([A-Z_]+)[ :].*\n(?:  //.*\n)*  ERROR_REASON_(\w+) = [1-9]", PROTO)


def test_every_reason_has_an_exception():
    names = {name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.keys()}  # noqa: SIM118
    assert set(errors.REASONS) == names - {"UNSPECIFIED"}
    assert {reason for _, reason in REASONS} == names - {"UNSPECIFIED"}


@pytest.mark.parametrize(("code", "reason"), REASONS)
def test_reasons_raise_their_exception(ask, code, reason):
    def failing(request, context):
        details = {"free": "12", "handle": "a1b2"}
        fail(context, grpc.StatusCode[code], "what to do", reason, details=details, retry=2.5)

    with serving(GetModel=failing) as fake, pytest.raises(moorage.Error) as caught:
        ask(fake.address, "model", "a1b2")
    error = caught.value
    assert type(error) is EXCEPTIONS[code]
    assert (error.reason, error.code.name) == (reason, code)
    assert error.message == str(error) == "what to do"
    assert error.details == {"free": "12", "handle": "a1b2"}
    assert error.retry_after == 2.5


@pytest.mark.parametrize("code", EXCEPTIONS)
@pytest.mark.parametrize("reason", [None, "MADE_LATER"])
def test_codes_raise_their_exception_where_no_reason_does(ask, code, reason):
    def failing(request, context):
        fail(context, grpc.StatusCode[code], "sorry", reason)
        yield

    with serving(Forward=failing) as fake, pytest.raises(moorage.Error) as caught:
        ask(fake.address, "forward", "a1b2", ROWS)
    assert type(caught.value) is EXCEPTIONS[code]
    assert caught.value.reason == (reason or "")
    assert "sorry" in caught.value.message
    assert caught.value.retry_after is None


def test_a_reason_of_another_domain_is_none_of_ours(ask):
    def failing(request, context):
        fail(context, grpc.StatusCode.INTERNAL, "sorry", "QUEUE_FULL", domain="elsewhere")

    with serving(GetModel=failing) as fake, pytest.raises(moorage.InternalError) as caught:
        ask(fake.address, "model", "a1b2")
    assert caught.value.reason == ""


def test_a_long_list_of_misfits_arrives_whole(ask):
    misfits = "layers.0.attn.q: [2304, 2048]; " * 2000

    def failing(request, context):
        fail(context, grpc.StatusCode.FAILED_PRECONDITION, misfits, "CHECKPOINT_MISMATCH")

    with serving(GetModel=failing) as fake, pytest.raises(moorage.FailedPrecondition) as caught:
        ask(fake.address, "model", "a1b2")
    assert caught.value.message == misfits


def test_an_answer_over_4_mib_is_typed_too(ask):
    response = pb.ListModelsResponse(models=[pb.Model(path="x" * (5 << 20))])
    with serving(ListModels=lambda *_: response) as fake, pytest.raises(moorage.MessageTooLarge):
        ask(fake.address, "models")


def test_nothing_listens(ask):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(moorage.Unavailable, match="moorage serve") as caught:
            ask(address, "info")
    assert address in caught.value.message


@pytest.mark.parametrize(("method", "arguments"), [("info", ()), ("forward", ("a1b2", ROWS))])
def test_no_answer_in_time(ask, method, arguments):
    released = threading.Event()

    def hanging(request, context):
        released.wait(10)
        return iter(())

    with serving(GetServerInfo=hanging, Forward=hanging) as fake:
        with pytest.raises(moorage.DeadlineExceeded, match="longer timeout"):
            ask(fake.address, method, *arguments, timeout=0.2)
        released.set()


def test_a_closed_client_says_so():
    client = moorage.connect("127.0.0.1:1")
    client.close()
    with pytest.raises(moorage.FailedPrecondition, match="closed"):
        client.info()


def test_errors_can_be_pickled():
    error = moorage.NotFound("gone", reason="MODEL_NOT_LOADED", details={"handle": "a1b2"})
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is moorage.NotFound
    assert (copy.message, copy.reason, copy.details) == (
        "gone",
        "MODEL_NOT_LOADED",
        {"handle": "a1b2"},
    )


# The package.


def test_the_server_is_named_by_argument_environment_or_default(monkeypatch):
    monkeypatch.delenv("MOORAGE_SERVER", raising=False)
    assert moorage.connect().address == "127.0.0.1:8470"
    monkeypatch.setenv("MOORAGE_SERVER", "tpu-host:1")
    assert moorage.connect().address == "tpu-host:1"
    assert moorage.connect("other:2").address == "other:2"


def test_import_is_thin_and_quick():
    code = (
        "import sys, time; start = time.perf_counter(); import moorage;"
        "print(time.perf_counter() - start, *{'jax', 'flax', 'tqdm', 'argparse', 'tokenizers'}"
        " & sys.modules.keys())"
    )

    def measure():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds, *heavy = done.stdout.split()
        assert heavy == []
        return float(seconds)

    assert min(measure() for _ in range(3)) < 0.5


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert moorage.__version__ == project["version"]
