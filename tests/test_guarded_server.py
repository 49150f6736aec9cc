"""A server with TLS and tokens: who may not come in, and what they are told."""

import asyncio
import ssl
import threading
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

import certificates
import moorage
from conftest import GOLDEN
from engine_double import EngineDouble
from moorage.v1 import moorage_pb2 as pb
from moorage_server.access import Access
from moorage_server.limits import Limits
from moorage_server.tls import TlsFiles
from server_thread import serving

TOKENS = {role: f"{role}-token-0123456789" for role in ("score", "load", "admin")}
EVERY_METHOD = [
    f"/{service.full_name}/{method.name}"
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.fixture(scope="module")
def trusted(tmp_path_factory):
    return certificates.authority(tmp_path_factory.mktemp("trusted"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return certificates.authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text("".join(f"my-{role} {role} {token}\n" for role, token in TOKENS.items()))
    return path


@pytest.fixture(scope="module")
def server(trusted, tokens):
    pair = trusted.issue("localhost", file="server")
    with serving(
        EngineDouble(), GOLDEN, access=Access(tokens), tls=TlsFiles(pair.cert, pair.key)
    ) as running:
        running.address = running.address.replace("127.0.0.1", "localhost")
        yield running


def connect(server, trusted, role=None, **options):
    tls = moorage.Tls(ca=str(trusted.file), **options)
    token = TOKENS[role] if role else ""
    return moorage.connect(server.address, tls=tls, token=token, timeout=10)


def reason_of(error: grpc.RpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    assert status
    assert status.details[0].Unpack(info)
    return info.reason


@pytest.fixture
def channel(server, trusted):
    credentials = grpc.ssl_channel_credentials(trusted.file.read_bytes())
    with grpc.secure_channel(server.address, credentials) as opened:
        yield opened


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("token", ["", "Bearer guessed-0123456789"])
def test_no_method_answers_without_a_token(channel, method, token):
    call = channel.unary_stream(method)(b"", metadata=[("authorization", token)], timeout=10)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert reason_of(caught.value) == "UNAUTHENTICATED"


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_who_is_not_known_is_refused_before_the_request_is_read(channel, method):
    """A request that never comes is not waited for."""
    never = threading.Event()
    call = channel.stream_stream(method)(iter(never.wait, True), timeout=10)
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    never.set()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert reason_of(caught.value) == "UNAUTHENTICATED"


def test_who_is_not_known_is_told_so_whatever_the_size(server, channel, trusted):
    large = bytes(4_000_000)
    for call in (channel.unary_unary(EVERY_METHOD[0]), channel.unary_stream(EVERY_METHOD[0])):
        with pytest.raises(grpc.RpcError) as caught:
            list(call(large, timeout=10))
        assert reason_of(caught.value) == "UNAUTHENTICATED"

    async def run():
        credentials = grpc.ssl_channel_credentials(trusted.file.read_bytes())
        async with grpc.aio.secure_channel(server.address, credentials) as opened:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await opened.unary_unary(EVERY_METHOD[0])(large, timeout=10)
            assert reason_of(caught.value) == "UNAUTHENTICATED"

    asyncio.run(run())


def test_neither_do_health_and_reflection(channel):
    check = health_pb2_grpc.HealthStub(channel).Check
    reflect = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    )
    for call in (
        lambda: check(health_pb2.HealthCheckRequest(), timeout=10),
        lambda: list(reflect(iter([b""]), timeout=10)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    carried = [("authorization", f"Bearer {TOKENS['score']}")]
    answer = check(health_pb2.HealthCheckRequest(), metadata=carried, timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_each_role_may_do_its_part(server, trusted):
    load = {"model_id": "llama3", "source": "internal", "model_path": "llama3"}
    with connect(server, trusted, "score") as scorer:
        assert scorer.info().version
        with pytest.raises(moorage.PermissionDenied, match="LoadModel takes a token of role load"):
            scorer.load(**load)
    with connect(server, trusted, "load") as loader:
        model = loader.load(**load, lease=60)
        assert model.requested_by == "my-load"
        assert [model.handle for model in loader.models()] == [model.handle]
    with connect(server, trusted, "score") as scorer:
        assert len(scorer.forward(model, [[7, 8, 9]]).logprobs[0]) == 3
        with pytest.raises(moorage.PermissionDenied):
            scorer.unload(model)
    with connect(server, trusted, "load") as loader, connect(server, trusted, "admin") as admin:
        loader.load(**load, lease=60)
        with pytest.raises(moorage.PermissionDenied, match="unloading a model that others lease"):
            loader.unload(model, force=True)
        admin.unload(model, force=True)
        errors = admin.info().activity.errors
    assert ("my-load", "UnloadModel", "PERMISSION_DENIED") in {
        (error.client, error.method, error.reason) for error in errors
    }


def test_a_refusal_tells_the_request_and_not_the_token(server, trusted):
    wrong = "wrong-token-0123456789"
    tls = moorage.Tls(ca=str(trusted.file))
    with (
        moorage.connect(server.address, tls=tls, token=wrong, timeout=10) as client,
        pytest.raises(moorage.Unauthenticated) as caught,
    ):
        client.models()
    assert str(caught.value) == (
        f"this server does not know that token (request {caught.value.details['request_id']})"
    )
    assert wrong not in repr(vars(client)) + repr(caught.value.__dict__)


def hint(client) -> str:
    with client, pytest.raises(moorage.Unavailable) as caught:
        client.models()
    return str(caught.value)


def test_what_is_wrong_with_a_connection_is_said(server, trusted, stranger):
    address, tls = server.address, moorage.Tls
    plain = moorage.connect(address, tls=False, token=TOKENS["admin"], timeout=10)
    assert "hung up" in (text := hint(plain))
    assert "it may want TLS" in text
    unknown = moorage.connect(address, tls=tls(ca=str(stranger.file)), timeout=10)
    assert "shows a certificate that cannot be trusted" in hint(unknown)
    named = moorage.connect(
        address, tls=tls(ca=str(trusted.file), server_name="elsewhere"), timeout=10
    )
    assert "shows a certificate of another host" in hint(named)


def test_a_plain_server_says_that_it_is_one(trusted):
    with serving(EngineDouble(), GOLDEN) as server:
        text = hint(connect(server, trusted))
    assert "does not speak TLS" in text


def test_an_expired_certificate_is_refused_on_both_sides(trusted):
    old, good = trusted.issue("localhost", expired=True, file="old"), trusted.issue("localhost")
    with serving(EngineDouble(), GOLDEN, tls=TlsFiles(old.cert, old.key)) as server:
        server.address = server.address.replace("127.0.0.1", "localhost")
        assert "certificate has expired" in hint(connect(server, trusted))
    files = TlsFiles(good.cert, good.key, trusted.file)
    with serving(EngineDouble(), GOLDEN, tls=files) as server:
        server.address = server.address.replace("127.0.0.1", "localhost")
        expired = connect(server, trusted, cert=str(old.cert), key=str(old.key))
        assert "a certificate of this client that it trusts" in hint(expired)
        assert "a certificate of this client that it trusts" in hint(connect(server, trusted))
        with connect(server, trusted, cert=str(good.cert), key=str(good.key)) as client:
            assert client.models() == []


def test_new_certificates_count_from_the_next_connection(trusted, stranger):
    pair = trusted.issue("localhost", file="changing")
    with serving(EngineDouble(), GOLDEN, tls=TlsFiles(pair.cert, pair.key)) as server:
        server.address = server.address.replace("127.0.0.1", "localhost")
        with connect(server, trusted) as client:
            assert client.models() == []
        fresh = stranger.issue("localhost")
        pair.key.write_bytes(fresh.key.read_bytes())  # one after the other, as they come
        pair.cert.write_bytes(fresh.cert.read_bytes())
        with connect(server, stranger) as client:
            assert client.models() == []


def test_certificates_that_do_not_belong_together_are_refused(trusted):
    one, other = trusted.issue("one"), trusted.issue("other")
    with pytest.raises(ValueError, match=r"one.*other"):
        TlsFiles(one.cert, other.key).credentials()
    assert isinstance(TlsFiles(one.cert, one.key).context(), ssl.SSLContext)


def test_asyncio_connects_the_same_way(server, trusted):
    async def run():
        tls = moorage.Tls(ca=str(trusted.file))
        async with moorage.aio.connect(server.address, tls=tls, token=TOKENS["score"]) as client:
            return await client.models()

    assert asyncio.run(run()) == []


def test_limits_are_refused_by_name(tokens):
    limits = Limits(models=2, client_models=1, leases=2, client_leases=1, client_requests=3)
    with serving(EngineDouble(), GOLDEN, access=Access(tokens), limits=limits) as server:
        clients = [moorage.connect(server.address, token=TOKENS[r]) for r in ("load", "admin")]
        with clients[0] as loader, clients[1] as admin:
            assert admin.info().limits == moorage.Limits(4096, 3, 1 << 20, 1024, 2, 1, 2, 1)
            loader.load("llama3", "internal", "llama3", lease=60)

            def limit(call, *arguments, **options):
                with pytest.raises(moorage.ResourceExhausted) as caught:
                    call(*arguments, **options)
                assert caught.value.reason == "LIMIT_EXCEEDED"
                return caught.value.details["limit"]

            assert limit(loader.load, "qwen3", "internal", "qwen3_tied") == "max_client_models"
            admin.load("qwen3", "internal", "qwen3_tied")
            assert (
                limit(loader.load, "llama3", "internal", "llama3", lease=9) == "max_client_leases"
            )
            watches = [admin.watch() for _ in range(3)]
            for watch in watches:
                next(watch)
            assert limit(admin.models) == "max_client_requests"
            for watch in watches:
                watch.close()
            until(lambda: admin.info().activity.requests == 1)
            assert admin.info().activity.refusals["LIMIT_EXCEEDED"] == 3


def until(condition):
    deadline = time.monotonic() + 10
    while True:
        try:
            if condition():
                return
        except moorage.ResourceExhausted:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)
