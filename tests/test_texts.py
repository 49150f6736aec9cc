"""What callers say of models and leases: how long it may be, and what the log has of it."""

import logging

import grpc
import pytest

from conftest import GOLDEN
from engine_double import EngineDouble
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.errors import ModelError, Reason
from moorage_server.convert import to_request
from server_thread import channel_to, serving

BAD = [
    ({"model_id": "x" * 257}, "model_id has 257 bytes; it may have 256"),
    ({"revision": "é" * 129}, "revision has 258 bytes; it may have 256"),
    ({"dtype": "x" * (2 << 20)}, "dtype has 2097152 bytes; it may have 256"),
    ({"compute_dtype": "\x1b[2J"}, r"compute_dtype has characters that cannot be shown: '\x1b[2J'"),
    ({"model_id": "two\nlines"}, r"model_id has characters that cannot be shown: 'two\nlines'"),
    ({"model_path": "x" * 4097}, "model_path has 4097 bytes; it may have 4096"),
    ({"model_download_path": "x" * 4097}, "model_download_path has 4097 bytes; it may have 4096"),
    ({"options": {str(i): "" for i in range(17)}}, "options has 17 entries; it may have 16"),
    ({"options": {"x" * 257: ""}}, "options has 257 bytes; it may have 256"),
    ({"options": {"x": "y" * 257}}, "options has 257 bytes; it may have 256"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_is_too_long_or_cannot_be_shown_is_refused(fields, message):
    with pytest.raises(ModelError) as caught:
        to_request(pb.ModelSpec(**fields))
    assert (caught.value.reason, caught.value.message) == (Reason.INVALID_REQUEST, message)


def test_what_is_just_short_enough_is_taken():
    options = {f"{i:x>256}": "y" * 256 for i in range(16)}
    spec = pb.ModelSpec(model_id="é" * 128, model_path="x" * 4096, options=options)
    assert to_request(spec).options == tuple(sorted(options.items()))


@pytest.fixture(scope="module")
def load():
    """Calls LoadModel, which must fail; gives what its caller is told."""
    with serving(EngineDouble(), GOLDEN) as server, channel_to(server.address) as channel:
        stub = pb_grpc.ModelServiceStub(channel)

        def refused(spec, **lease):
            request = pb.LoadModelRequest(model=spec)
            if lease:
                request.lease.CopyFrom(pb.LeaseSpec(duration={"seconds": 9}, **lease))
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.LoadModel(request, timeout=10))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            return caught.value.details()

        yield refused


@pytest.mark.parametrize("name", ["x" * 257, "two\nlines"])
def test_the_name_of_a_leases_holder_is_one(load, name):
    spec = pb.ModelSpec(model_id="x", source="MODEL_SOURCE_INTERNAL", model_path="llama3")
    assert "lease.client has" in load(spec, client=name)


def test_the_log_has_one_short_line_of_a_refusal(load, caplog):
    spec = pb.ModelSpec(model_id="x", source="MODEL_SOURCE_INTERNAL", model_path="\x1b" * 4096)
    with caplog.at_level(logging.INFO, "moorage_server"):
        load(spec)
    (line,) = (r.getMessage() for r in caplog.records if r.name == "moorage_server.interceptor")
    assert line.startswith("LoadModel of ipv4:")
    assert line.isprintable()
    assert len(line) < 5000
