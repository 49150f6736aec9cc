"""Every bad request is answered with its code and reason, and the server goes on."""

# ruff: noqa: F401, F811 (fixtures are imported)
import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import moorage
from conftest import GOLDEN
from golden_server import SECRET, bad, channel, client, load, server
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_server import requests

INTERNAL = pb.MODEL_SOURCE_INTERNAL

PATHS = [  # model id, path, code, reason, a part of the message
    ("x", "no_config", "INVALID_ARGUMENT", "MODEL_ID_UNPARSEABLE", "'x'"),
    ("moon-7b", "no_config", "INVALID_ARGUMENT", "MODEL_FAMILY_UNKNOWN", "moon"),
    ("meta-llama/Llama-3-7B", "no_config", "NOT_FOUND", "CONFIG_UNKNOWN", "llama3_8b"),
    ("x", "truncated", "DATA_LOSS", "CHECKPOINT_CORRUPT", "model.safetensors"),
    ("x", "broken_json", "DATA_LOSS", "CHECKPOINT_CORRUPT", "config.json"),
    ("x", "missing_file", "DATA_LOSS", "CHECKPOINT_CORRUPT", "model-00003-of-00007"),
    ("x", "wrong_shapes", "FAILED_PRECONDITION", "CHECKPOINT_MISMATCH", "wanted [320, 80]"),
    ("x", "quantised", "UNIMPLEMENTED", "CHECKPOINT_UNSUPPORTED", "gptq"),
    ("x", "empty", "NOT_FOUND", "CHECKPOINT_NOT_FOUND", "no safetensors file"),
    ("x", "absent", "NOT_FOUND", "CHECKPOINT_NOT_FOUND", "'absent'"),
    ("x", "llama3/config.json", "NOT_FOUND", "CHECKPOINT_NOT_FOUND", "config.json"),
    ("x", "", "INVALID_ARGUMENT", "MODEL_PATH_REQUIRED", "model_path"),
    ("x", "/etc", "PERMISSION_DENIED", "SOURCE_NOT_ALLOWED", "'/etc'"),
    ("x", "../../..", "PERMISSION_DENIED", "SOURCE_NOT_ALLOWED", "'../../..'"),
    ("x", "llama3/../../data", "PERMISSION_DENIED", "SOURCE_NOT_ALLOWED", "data"),
    ("x", "linked", "PERMISSION_DENIED", "SOURCE_NOT_ALLOWED", "'linked/config.json'"),
    ("x", "a\0b", "INVALID_ARGUMENT", "INVALID_REQUEST", "a\\x00b"),
    ("x", "long" * 100, "INVALID_ARGUMENT", "INVALID_REQUEST", "longlong"),
    ("x", "long" * 1000, "INVALID_ARGUMENT", "INVALID_REQUEST", "(cut;"),
]
SPECS = [
    ({"source": 99}, "INVALID_ARGUMENT", "INVALID_REQUEST", "99"),
    ({"source": -1}, "INVALID_ARGUMENT", "INVALID_REQUEST", "-1"),
    ({"source": "MODEL_SOURCE_KAGGLE"}, "PERMISSION_DENIED", "SOURCE_NOT_ALLOWED", "KAGGLE"),
    ({"dtype": "int4"}, "INVALID_ARGUMENT", "INVALID_REQUEST", "float32, float16, bfloat16"),
    ({"compute_dtype": "float64"}, "INVALID_ARGUMENT", "INVALID_REQUEST", "'float64'"),
    ({"model_download_path": "/tmp"}, "PERMISSION_DENIED", "SOURCE_NOT_ALLOWED", "'/tmp'"),
    ({"source": 0, "model_path": ""}, "INVALID_ARGUMENT", "MODEL_PATH_REQUIRED", "owner/name"),
]
ROWS = [  # fields of a ForwardRequest
    ({"token_ids": [5, -1], "row_lengths": [2]}, "TOKEN_OUT_OF_RANGE", {"position": "1"}),
    ({"token_ids": [320], "row_lengths": [1]}, "TOKEN_OUT_OF_RANGE", {"row": "0"}),
    ({"token_ids": [5], "row_lengths": [1, 0]}, "ROW_EMPTY", {"row": "1"}),
    ({}, "ROW_EMPTY", {}),
    ({"token_ids": [5, 6], "row_lengths": [1]}, "INVALID_REQUEST", {}),
    ({"token_ids": [5], "row_lengths": [2**31 - 1]}, "INVALID_REQUEST", {}),
    ({"token_ids": [5], "row_lengths": [1], "segment_ids": [2]}, "INVALID_REQUEST", {"row": "0"}),
    ({"token_ids": [5], "row_lengths": [1], "segment_ids": [1, 1]}, "INVALID_REQUEST", {}),
    ({"token_ids": [5] * 129, "row_lengths": [129]}, "SEQUENCE_TOO_LONG", {"limit": "128"}),
]


@pytest.fixture
def expect(server, client, channel, bad):
    """Makes a raw call that must fail as told, in a server that goes on; gives its message."""

    def fails(method: str, request, code: str, reason: str, details=None) -> str:
        service, name = method.split("/")
        stub = getattr(pb_grpc, f"{service}Stub")(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(getattr(stub, name)(request, timeout=20))
        error = caught.value
        status = rpc_status.from_call(error)
        (packed,) = status.details
        info = error_details_pb2.ErrorInfo()
        assert packed.Unpack(info)
        assert (error.code().name, info.reason, info.domain) == (code, reason, "moorage")
        assert dict(info.metadata).items() >= (details or {}).items()
        for leak in (str(GOLDEN), str(bad), SECRET, "Traceback", ".py"):
            assert leak.encode() not in status.SerializeToString()
            assert leak not in str(error.trailing_metadata())
        assert load(client).forward([[5, 6]]).logprobs[0].shape == (2,)
        return status.message

    return fails


@pytest.mark.parametrize(("model_id", "path", "code", "reason", "part"), PATHS)
def test_checkpoints_that_cannot_be_loaded(expect, channel, model_id, path, code, reason, part):
    spec = pb.ModelSpec(model_id=model_id, source=INTERNAL, model_path=path)
    message = expect("ModelService/LoadModel", pb.LoadModelRequest(model=spec), code, reason)
    assert part in message
    request = pb.ResolveNameRequest(model=spec, check_source=True)
    answer = pb_grpc.NamingServiceStub(channel).ResolveName(request)
    assert (answer.loadable, answer.reason) == (False, reason)


def test_every_misfit_is_listed(expect):
    spec = pb.ModelSpec(model_id="x", source=INTERNAL, model_path="wrong_shapes")
    request = pb.LoadModelRequest(model=spec)
    message = expect(
        "ModelService/LoadModel", request, "FAILED_PRECONDITION", "CHECKPOINT_MISMATCH"
    )
    names = ["embed", "head", "final_norm"] + [
        f"layers.{name}"
        for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    lines = message.splitlines()[1:]
    assert [name for name in names if not any(line.startswith(name) for line in lines)] == []


@pytest.mark.parametrize(("fields", "code", "reason", "part"), SPECS)
def test_models_that_are_named_wrongly(expect, fields, code, reason, part):
    good = {"model_id": "x", "source": INTERNAL, "model_path": "llama3"}
    spec = pb.ModelSpec(**{**good, **fields})
    message = expect("ModelService/LoadModel", pb.LoadModelRequest(model=spec), code, reason)
    assert part in message


@pytest.mark.parametrize(("fields", "reason", "details"), ROWS)
def test_rows_that_cannot_be_scored(expect, client, fields, reason, details):
    request = pb.ForwardRequest(handle=load(client).handle, **fields)
    expect("ScoringService/Forward", request, "INVALID_ARGUMENT", reason, details)


def test_an_answer_over_the_limit(expect, client, monkeypatch):
    request = pb.ForwardRequest(
        handle=load(client).handle, token_ids=[5, 6], row_lengths=[2], outputs={"names": ["logits"]}
    )
    monkeypatch.setattr(requests, "MAX_OUTPUT_BYTES", 2559)
    message = expect(
        "ScoringService/Forward",
        request,
        "INVALID_ARGUMENT",
        "OUTPUT_TOO_LARGE",
        {"limit": "2559"},
    )
    assert "2560" in message


def test_outputs_that_are_not_finite(expect, client):
    model = load(client, "nan")
    request = pb.ForwardRequest(handle=model.handle, token_ids=[5, 6], row_lengths=[2])
    expect("ScoringService/Forward", request, "INTERNAL", "NON_FINITE_OUTPUT", {"rows": "0"})
    with pytest.raises(moorage.InternalError, match=r"not finite: 1\."):
        model.forward([[5], [6, 7]])
    client.unload(model)


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("ModelService/GetModel", pb.GetModelRequest),
        ("ModelService/UnloadModel", pb.UnloadModelRequest),
        ("ScoringService/Forward", pb.ForwardRequest),
    ],
)
@pytest.mark.parametrize("handle", ["", "0123456789ab", "\N{ANCHOR}" * 9999])
def test_handles_that_are_unknown(expect, method, request_type, handle):
    expect(method, request_type(handle=handle), "NOT_FOUND", "MODEL_NOT_LOADED")


@pytest.mark.parametrize(
    "method",
    [
        "NamingService/ResolveName",
        "ModelService/LoadModel",
        "ModelService/GetModel",
        "ScoringService/Forward",
    ],
)
def test_bytes_that_are_no_message(expect, channel, method):
    kind = "stream" if method.split("/")[1] in ("LoadModel", "Forward") else "unary"
    call = getattr(channel, f"unary_{kind}")(f"/moorage.v1.{method}")
    with pytest.raises(grpc.RpcError) as caught:
        list(call(b"\xff\xff\xff"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert rpc_status.from_call(caught.value).details[0].value.count(b"INVALID_REQUEST") == 1


@pytest.mark.parametrize(
    ("model_id", "fields", "reason"),
    [
        ("x", {}, "MODEL_ID_UNPARSEABLE"),
        ("gemma2_2b", {"dtype": "int4"}, "INVALID_REQUEST"),
        ("gemma2_2b", {"source": 99}, "INVALID_REQUEST"),
    ],
)
def test_names_that_cannot_be_resolved(expect, model_id, fields, reason):
    spec = pb.ModelSpec(model_id=model_id, **fields)
    request = pb.ResolveNameRequest(model=spec, estimate="dtype" in fields)
    expect("NamingService/ResolveName", request, "INVALID_ARGUMENT", reason)


def test_a_request_over_4_mib_is_refused_by_grpc(client, channel):
    model = load(client)
    request = pb.ForwardRequest(
        handle=model.handle, token_ids=[300] * 2_600_000, row_lengths=[100] * 26_000
    )
    assert request.ByteSize() > 5_000_000
    with pytest.raises(grpc.RpcError) as caught:
        list(pb_grpc.ScoringServiceStub(channel).Forward(request))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rpc_status.from_call(caught.value) is None
    assert model.forward([[5, 6]]).logprobs[0].shape == (2,)
