"""Reasons and codes on the wire: one list in several places, and what a bug looks like."""

import io
import logging
import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import moorage
from conftest import GOLDEN
from engine_double import EngineDouble
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.errors import ModelError
from moorage_models.errors import Reason as ModelReason
from moorage_server import logs
from moorage_server.errors import Reason as ServerReason
from moorage_server.errors import ServerError
from moorage_server.status import CODES, status_of
from server_thread import channel_to, serving

PROTO = Path(__file__).parent.parent / "proto" / "moorage" / "v1" / "moorage.proto"
PREFIX = "ERROR_REASON_"


def reasons_of_the_proto() -> dict[str, str]:
    """Each reason, and the codes that the comment above it states."""
    entry = re.compile(r"// (?P<codes>[A-Z_ or]+): .*\n +ERROR_REASON_(?P<name>\w+) = \d+;")
    return {m["name"]: m["codes"] for m in entry.finditer(PROTO.read_text())}


def test_every_reason_has_a_code():
    assert {*ModelReason, *ServerReason} == set(CODES)
    assert all(reason.name == reason.value for reason in [*ModelReason, *ServerReason])


def test_every_reason_is_on_the_wires_list():
    listed = {name.removeprefix(PREFIX) for name in pb.ErrorReason.keys()}  # noqa: SIM118
    assert listed - {"UNSPECIFIED"} == set(CODES)


def test_codes_are_those_that_the_proto_states():
    stated = reasons_of_the_proto()
    assert stated.keys() == set(CODES)
    wrong = {
        reason: code for reason, code in CODES.items() if code.name not in stated[reason].split()
    }
    assert wrong == {}


def test_the_client_raises_the_kind_of_the_code():
    for reason, code in CODES.items():
        kind = moorage.errors.REASONS[reason]
        assert code in (kind.code, grpc.StatusCode.UNAUTHENTICATED), reason


@pytest.mark.parametrize(
    ("error", "code", "reason", "details"),
    [
        (
            ModelError(ModelReason.CHECKPOINT_NOT_FOUND, "no such thing", repo="a/b"),
            grpc.StatusCode.NOT_FOUND,
            "CHECKPOINT_NOT_FOUND",
            {"repo": "a/b"},
        ),
        (
            ServerError(ServerReason.TOKEN_OUT_OF_RANGE, "no such thing", row="3"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "TOKEN_OUT_OF_RANGE",
            {"row": "3"},
        ),
    ],
)
def test_our_errors_are_told_as_they_are(error, code, reason, details):
    status = status_of(error, "request-7")
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, status.message) == (code.value[0], "no such thing")
    assert info == error_details_pb2.ErrorInfo(
        reason=reason, domain="moorage", metadata=details | {"request_id": "request-7"}
    )


@pytest.mark.parametrize("letter", ["a", "\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{ANCHOR}"])
def test_a_long_message_says_that_it_was_cut(letter):
    status = status_of(ModelError(ModelReason.CHECKPOINT_MISMATCH, letter * 5000), "x")
    assert re.fullmatch(f"{letter}+ ... \\(cut; the server's log has more\\)", status.message)
    assert 1600 < len(status.message.encode()) < 1800


# A bug, through a server.


@pytest.fixture
def log():
    """What the server logs, as text."""
    stream, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.TextFormatter("%(levelname)s %(message)s%(request)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def bug(*arguments):
    raise RuntimeError("boom in /srv/secret/place")


CALLS = {
    "GetServerInfo": lambda channel: pb_grpc.ServerServiceStub(channel).GetServerInfo(
        pb.GetServerInfoRequest()
    ),
    "ResolveName": lambda channel: pb_grpc.NamingServiceStub(channel).ResolveName(
        pb.ResolveNameRequest(model=pb.ModelSpec(model_id="gemma2_2b"), estimate=True)
    ),
    "LoadModel": lambda channel: list(
        pb_grpc.ModelServiceStub(channel).LoadModel(
            pb.LoadModelRequest(
                model=pb.ModelSpec(
                    model_id="x", source=pb.MODEL_SOURCE_INTERNAL, model_path="llama3"
                )
            )
        )
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bug_is_a_number_on_the_wire_and_a_traceback_in_the_log(name, log):
    engine = EngineDouble()
    with serving(engine, GOLDEN) as server, channel_to(server.address) as channel:
        engine.info = engine.need = bug
        with pytest.raises(grpc.RpcError) as caught:
            CALLS[name](channel)
        del engine.info, engine.need
        status = rpc_status.from_call(caught.value)
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert (info.reason, list(info.metadata)) == ("INTERNAL", ["request_id"])
        number = info.metadata["request_id"]
        assert re.fullmatch(r"[0-9a-f]{16}", number)
        assert status.message == f"a bug in the server; its log has the details under {number}"
        for leak in ("boom", "secret", "Traceback", "RuntimeError"):
            assert leak not in str(caught.value.trailing_metadata())
        text = log.getvalue()
        assert f"{number}" in text
        assert "boom in /srv/secret/place" in text
        assert "Traceback (most recent call last)" in text
        assert "in bug" in text
        assert CALLS[name](channel)  # the server goes on


def test_a_caller_may_choose_the_id_that_the_log_has(log):
    with serving(EngineDouble(), GOLDEN) as server, channel_to(server.address) as channel:
        stub = pb_grpc.ModelServiceStub(channel)
        for given, kept in (("mine-7", True), ("not mine, at all", False), ("x" * 65, False)):
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetModel(pb.GetModelRequest(handle="none"), metadata=[("x-request-id", given)])
            info = error_details_pb2.ErrorInfo()
            assert rpc_status.from_call(caught.value).details[0].Unpack(info)
            assert (info.metadata["request_id"] == given) == kept
            assert f"(request {info.metadata['request_id']})" in log.getvalue()
