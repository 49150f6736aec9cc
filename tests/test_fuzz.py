"""Whatever is sent, the server answers with a reason from the list, and goes on."""

from __future__ import annotations

import os
import random
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moorage
from conftest import GOLDEN
from golden_server import load
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.sources import ModelSource
from moorage_server.engine.outputs import OUTPUTS
from moorage_server.status import CODES
from server_thread import channel_to, serving
from test_scheduler import Wide

SECONDS = 5.0  # of one call, after which it counts as a hang
ENDLESS = {"WatchModels"}
SOAK_CASES, SOAK_SECONDS, SOAK_BYTES = 100_000, 1800.0, 600 << 20
LIGHT = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
METHODS = [
    method
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods_by_name.values()
]
FORWARD = next(method for method in METHODS if method.name == "Forward")


@pytest.fixture(scope="module")
def made():
    """A server with a model that an engine without devices runs; and a channel to it."""
    with serving(Wide(), GOLDEN, sources=[ModelSource.INTERNAL]) as running:
        with moorage.connect(running.address) as connected:
            running.handle = load(connected).handle
        with channel_to(running.address) as running.channel:
            yield running
            answers(running)


def answers(made) -> None:
    """The server goes on."""
    stub = pb_grpc.ServerServiceStub(made.channel)
    assert stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=SECONDS).version


def send(made, method, data: bytes) -> str:
    """Sends bytes as the request of a method, and gives the reason of the refusal, or ""."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    parse = GetMessageClass(method.output_type).FromString
    # Both kinds of methods look alike on the wire.
    call = made.channel.unary_stream(path, None, parse)(data, timeout=SECONDS)
    try:
        for _ in call:
            if method.name in ENDLESS:
                call.cancel()
                break
    except grpc.RpcError as error:
        return reason_of(rpc_status.from_call(error))
    return ""


def reason_of(status) -> str:
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info), status
    assert info.reason in CODES, status
    assert info.reason != "INTERNAL", status
    assert CODES[info.reason].value[0] == status.code
    assert status.message
    return str(info.reason)


# Any values in any fields.

INTEGERS = st.one_of(st.integers(-3, 130), st.sampled_from([2**31 - 1, -(2**31), 1000]))
LARGE = st.one_of(INTEGERS, st.sampled_from([2**63 - 1, -(2**63), 253402300800]))
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["llama3", "gemma2_2b", "../..", "/", "float32", "a" * 5000, "x/y"]),
)
VALUES = {
    FieldDescriptor.TYPE_INT32: INTEGERS,
    FieldDescriptor.TYPE_INT64: LARGE,
    FieldDescriptor.TYPE_ENUM: st.one_of(st.integers(-1, 6), INTEGERS),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=40),
}


def values_of(field) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if kind and kind.GetOptions().map_entry:
        return st.dictionaries(TEXTS, TEXTS, max_size=3)
    one = messages(kind) if kind else VALUES[field.type]
    return st.lists(one, max_size=12) if field.is_repeated else one


def messages(kind) -> st.SearchStrategy[Any]:
    """Messages of any kind, with any of their fields."""
    fields = st.fixed_dictionaries(
        {}, optional={field.name: values_of(field) for field in kind.fields}
    )
    return fields.map(lambda values: GetMessageClass(kind)(**values))


@st.composite
def nearly_right(draw) -> pb.ForwardRequest:
    """A forward request that could be right but for one or two of its fields."""
    rows = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    tokens = draw(st.lists(st.integers(0, 319), min_size=sum(rows), max_size=sum(rows)))
    names = draw(st.lists(st.sampled_from([*OUTPUTS, "none"]), max_size=3))
    request = pb.ForwardRequest(token_ids=tokens, row_lengths=rows, outputs={"names": names})
    if "top_k" in names:
        request.outputs.top_k = draw(st.integers(1, 400))
    if "candidates" in names:
        request.outputs.candidates.ids.extend(draw(st.lists(st.integers(0, 319), max_size=5)))
    fields = list(pb.ForwardRequest.DESCRIPTOR.fields)
    for field in draw(st.lists(st.sampled_from(fields), max_size=2)):
        request.ClearField(field.name)
        request.MergeFrom(pb.ForwardRequest(**{field.name: draw(values_of(field))}))
    return request


REQUESTS = st.one_of(
    st.sampled_from(METHODS).flatmap(
        lambda method: st.tuples(st.just(method), messages(method.input_type))
    ),
    st.tuples(st.just(FORWARD), nearly_right()),
    st.tuples(st.just(FORWARD), nearly_right()),
)


def fuzz(made, method, request) -> str:
    if method is FORWARD:
        request.handle = request.handle or made.handle
    return send(made, method, request.SerializeToString())


@LIGHT
@given(REQUESTS)
def test_any_values_in_any_fields(made, case):
    fuzz(made, *case)


@LIGHT
@given(nearly_right())
def test_forward_requests_that_are_nearly_right(made, request_):
    fuzz(made, FORWARD, request_)


def test_some_of_them_are_right(made):
    """Else nothing behind the checks would be reached."""
    found: set[str] = set()

    @settings(LIGHT, max_examples=100, derandomize=True)
    @given(nearly_right())
    def run(request):
        found.add(fuzz(made, FORWARD, request))

    run()
    assert {"", "INVALID_REQUEST", "OUTPUT_NOT_SERVED"} <= found


# Any bytes.


@st.composite
def damaged(draw) -> bytes:
    data = bytearray(draw(nearly_right()).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


BYTES = st.one_of(
    st.tuples(st.sampled_from(METHODS), st.binary(max_size=60)),
    st.tuples(st.just(FORWARD), damaged()),
)


@LIGHT
@given(BYTES)
def test_any_bytes_as_a_request(made, case):
    send(made, *case)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes.fromhex("000000 04 00 00000000")


def test_any_bytes_on_the_port(made):
    host, _, port = made.address.rpartition(":")
    draw = random.Random(1)
    with ExitStack() as stack:
        for number in range(80):
            raw = stack.enter_context(socket.create_connection((host, int(port)), SECONDS))
            if number % 4:  # the others are left half open
                head = (b"", PREFACE, PREFACE + SETTINGS)[number % 4 - 1]
                raw.sendall(head + draw.randbytes(draw.randrange(1, 2000)))
            if number % 3 == 0:
                raw.close()
        answers(made)
    answers(made)


# Much of it.


def test_a_message_of_the_largest_size_does_not_stop_the_others(made):
    """1.3 million rows of one token, and of one segment each."""
    count = 1_300_000
    request = pb.ForwardRequest(
        handle=made.handle, token_ids=[1] * count, row_lengths=[1] * count, segment_ids=[1] * count
    )
    begin = time.monotonic()
    assert send_large(made, request) in (None, grpc.StatusCode.OK)
    assert time.monotonic() - begin < SECONDS
    request.token_ids.extend([1] * count)
    assert send_large(made, request) is grpc.StatusCode.RESOURCE_EXHAUSTED  # gRPC's own
    answers(made)


def send_large(made, request) -> grpc.StatusCode | None:
    call = pb_grpc.ScoringServiceStub(made.channel).Forward(request, timeout=30)
    try:
        for part in call:
            if part.WhichOneof("part") == "header":
                call.cancel()
                return None
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def resident() -> int:
    """Bytes of memory that this process takes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.soak
@pytest.mark.timeout(2 * SOAK_SECONDS)
def test_a_hundred_thousand_cases(made):
    begin, cases, before = time.monotonic(), 0, resident()

    @settings(LIGHT, max_examples=2000, database=None)
    @given(st.one_of(REQUESTS, BYTES))
    def run(case):
        nonlocal cases
        method, request = case
        cases += 1
        (send if isinstance(request, bytes) else fuzz)(made, method, request)

    while cases < SOAK_CASES and time.monotonic() - begin < SOAK_SECONDS:
        run()
    grown = resident() - before
    print(f"{cases} cases in {time.monotonic() - begin:.0f} s, {grown >> 20} MiB more")
    assert cases >= SOAK_CASES
    assert grown < SOAK_BYTES
