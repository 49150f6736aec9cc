"""The status page by HTTP: the rpc's numbers, who may read them, and what every answer carries."""

import asyncio
import base64
import http.client
import json
import os
import re
import signal
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from google.protobuf.json_format import ParseDict

import certificates
import moorage
from conftest import GOLDEN
from engine_double import EngineDouble
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.sources import Policy
from moorage_server import http_server, serving, status_page
from moorage_server.cache import ModelCache
from moorage_server.settings import Settings
from moorage_server.tls import TlsFiles
from server_process import free_port
from status_server import status_server

STATIC = Path(status_page.__file__).parent / "static"
SCRIPTS = sorted(STATIC.glob("*.js"))
ROUTES = ["/", "/status.json", "/metrics", *(f"/static/{path.name}" for path in STATIC.iterdir())]
TOKEN = "my-token-0123456789"
SAFE = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"me score {TOKEN}\n")
    return path


def ask(*paths, tokens=None, **options):
    """The answers of a server without models."""

    async def run():
        async with status_server(EngineDouble(), tokens=tokens) as server:
            return [await server.get(path, **options) for path in paths]

    return asyncio.run(run())


# The numbers.


def test_the_status_is_what_the_rpcs_say():
    async def run():
        engine = EngineDouble()
        async with (
            status_server(engine, GOLDEN) as server,
            moorage.aio.connect(server.address) as client,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            model = await client.load("a", "internal", "llama3", lease=60, client_name="grpo-7")
            await model.forward([[1, 2, 3]])
            engine.hold("place")
            loading = asyncio.create_task(client.load("<b>", "internal", "qwen3_moe"))
            await asyncio.to_thread(engine.reached, "place", 2)
            with pytest.raises(moorage.NotFound):
                await client.load("b", "internal", "nowhere")
            stub = pb_grpc.ModelServiceStub(channel)
            info = await pb_grpc.ServerServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest())
            models = (await stub.ListModels(pb.ListModelsRequest())).models
            each = [await stub.GetModel(pb.GetModelRequest(handle=m.handle)) for m in models]
            found = await server.status()
            engine.release()
            await loading
            return info, each, found

    info, each, found = asyncio.run(run())
    shown = ParseDict(found["server"], pb.GetServerInfoResponse())
    assert shown.activity.requests == info.activity.requests - 1 == 1  # the rpc counts itself
    shown.activity.requests = info.activity.requests
    assert shown == info
    assert (info.activity.forwards, len(info.activity.errors)) == (1, 1)
    models = [ParseDict(model, pb.GetModelResponse()) for model in found["models"]]
    assert [model.model.spec.model_id for model in models] == ["a", "<b>"]
    assert [model.model.state for model in models] == [
        pb.MODEL_STATE_READY,
        pb.MODEL_STATE_LOADING,
    ]
    for model, told in zip(models, each, strict=True):
        assert list(model.layout) == list(told.layout) != []
        for message in (model.model, told.model):  # what goes on with the time
            message.progress.ClearField("elapsed")
            for lease in message.leases:
                lease.ClearField("time_left")
        assert model == told


def test_nothing_is_left_out_that_is_zero():
    [answer] = ask("/status.json")
    assert answer.headers["content-type"] == "application/json"
    server = json.loads(answer.text)["server"]
    assert (server["activity"]["forwards"], server["compiles_after_ready"]) == ("0", "0")
    assert [device["id"] for device in server["devices"]] == [0, 1]


def test_events_go_on_until_the_server_stops():
    async def run():
        async with (
            status_server(EngineDouble(), GOLDEN) as server,
            moorage.aio.connect(server.address) as client,
        ):
            host = server.page.url.removeprefix("http://")
            reader, writer = await asyncio.open_connection(*host.split(":"))
            writer.write(f"GET /events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            first = await reader.readuntil(b"\n\n")
            await client.load("a", "internal", "llama3")
            second = await reader.readuntil(b"\n\n")
        rest = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        return head.decode(), first, second, rest

    head, first, second, rest = asyncio.run(run())
    assert "content-type: text/event-stream" in head
    assert "cache-control: no-store" in head
    counts = [len(json.loads(event.partition(b"data: ")[2])["models"]) for event in (first, second)]
    assert counts == [0, 1]
    assert rest.endswith(b"0\r\n\r\n")  # the end of the answer, not of the connection alone


# What is served, and how.


def test_every_answer_has_the_headers(tokens):
    answers = ask(*ROUTES, "/nothing", "/static/nothing", "/static/../tls.py")
    assert [answer.code for answer in answers] == [200] * len(ROUTES) + [404] * 3
    answers += ask("/", tokens=tokens) + ask("/", host="evil.example") + ask("/", method="POST")
    assert [answer.code for answer in answers[-3:]] == [401, 421, 405]
    for answer in answers:
        assert answer.headers.items() >= SAFE.items()
        assert "server" not in answer.headers


def test_types_of_files():
    page, script, style, icon = ask(
        "/", "/static/page.js", "/static/status.css", "/static/icon.svg"
    )
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert style.headers["content-type"] == "text/css; charset=utf-8"
    assert icon.headers["content-type"] == "image/svg+xml"


def test_the_page_needs_nothing_from_elsewhere_and_has_no_inline_script():
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style|style=|\son\w+=", page)
    for path in STATIC.iterdir():
        addresses = set(re.findall(r"https?://[^\"'`) ]+", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}
    named = set(re.findall(r'(?:href|src)="static/([^"]+)"', page))
    for script in SCRIPTS:
        named |= set(re.findall(r'from "\./([^"]+)"', script.read_text()))
    assert named | {"index.html"} == {path.name for path in STATIC.iterdir()}


def test_no_script_makes_elements_of_text():
    for script in SCRIPTS:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|DOMParser",
            script.read_text(),
        )


def test_it_is_to_be_looked_at_only():
    async def run():
        async with status_server(EngineDouble()) as server:
            return [
                (await server.get(path, method=method)).code
                for path in ("/", "/status.json", "/events", "/metrics")
                for method in ("POST", "PUT", "DELETE", "PATCH")
            ]

    assert asyncio.run(run()) == [405] * 16


def test_a_page_on_loopback_is_asked_for_as_such():
    hosts = ["localhost", "127.0.0.1:1", "[::1]:1", "evil.example", "127.0.0.1.evil.example:80", ""]

    async def run():
        async with status_server(EngineDouble()) as server:
            return [(await server.get("/status.json", host=host)).code for host in hosts]

    assert asyncio.run(run()) == [200, 200, 200, 421, 421, 421]


def test_who_asks_for_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(http_server, "_HEAD_SECONDS", 0.3)
    whole = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def ended(server, asked):
        reader, writer = await asyncio.open_connection(*server.page.url[7:].split(":"))
        writer.write(asked)
        with suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 5)
        writer.close()

    async def run():
        async with status_server(EngineDouble()) as server:
            body = whole.replace(b"Host", b"Content-Length: 9\r\nHost") + b"1"
            asked = [b"", whole[:-2], whole + whole[:-2], body]
            events = asyncio.create_task(ended(server, whole.replace(b"metrics", b"events")))
            await asyncio.gather(*(ended(server, each) for each in asked))
            assert not events.done()
        await events

    asyncio.run(run())


@pytest.mark.parametrize("secure", [False, True])
def test_more_connections_than_it_has_room_for_are_closed(monkeypatch, trusted, secure):
    monkeypatch.setattr(http_server, "_CONNECTIONS", 3)
    pair = trusted.issue("127.0.0.1", file="room")
    files = TlsFiles(pair.cert, pair.key) if secure else None
    context = ssl.create_default_context(cafile=trusted.file) if secure else None

    async def run():
        async with status_server(EngineDouble(), tls=files) as server:
            where = server.page.url.rpartition("/")[2].split(":")
            held = [await asyncio.open_connection(*where) for _ in range(3)]
            for _ in range(5):
                reader, writer = await asyncio.open_connection(*where)
                assert await asyncio.wait_for(reader.read(), 5) == b""
                writer.close()
            for _, writer in held:
                writer.close()
                await writer.wait_closed()
            await asyncio.sleep(0.1)
            return (await server.get("/metrics", context=context)).code

    assert asyncio.run(run()) == 200


# Who may read.


def basic(password, user=""):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


RIGHT = [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN), basic(TOKEN, "anybody")]
WRONG = [
    "",
    TOKEN,
    "Bearer guessed-0123456789",
    basic("guessed-0123456789"),
    basic("", TOKEN),
    "Basic",
    "Basic not/base=64",
    "Basic " + base64.b64encode(b"\xff\xfe").decode(),
]


def test_a_token_is_wanted(tokens):
    routes = ["/", "/status.json", "/metrics", "/static/page.js", "/nothing"]

    async def run(authorization):
        async with status_server(EngineDouble(), tokens=tokens) as server:
            return [
                [await server.get(path, authorization=value) for path in routes]
                for value in authorization
            ]

    for answers in asyncio.run(run(RIGHT)):
        assert [answer.code for answer in answers] == [200, 200, 200, 200, 404]
    for answers in asyncio.run(run(WRONG)):
        assert [answer.code for answer in answers] == [401] * 5
        assert answers[0].headers["www-authenticate"].startswith("Basic realm=")
        assert TOKEN not in answers[0].text + str(answers[0].headers)


def test_a_token_in_an_address_is_none(tokens):
    answers = ask(f"/?token={TOKEN}", f"/status.json?authorization=Bearer%20{TOKEN}", tokens=tokens)
    assert [answer.code for answer in answers] == [401, 401]


def test_a_token_that_was_taken_away_reads_no_more(tokens):
    async def run():
        async with status_server(EngineDouble(), tokens=tokens) as server:
            before = await server.get("/", authorization=f"Bearer {TOKEN}")
            tokens.write_text("me score another-token-0123456789\n")
            return before, await server.get("/", authorization=f"Bearer {TOKEN}")

    assert [answer.code for answer in asyncio.run(run())] == [200, 401]


# TLS.


@pytest.fixture(scope="module")
def trusted(tmp_path_factory):
    return certificates.authority(tmp_path_factory.mktemp("trusted"))


def test_certificates_are_read_again(trusted):
    pair = trusted.issue("127.0.0.1", file="page")
    context = ssl.create_default_context(cafile=trusted.file)

    def serial(url):
        connection = http.client.HTTPSConnection(url.removeprefix("https://"), context=context)
        connection.request("GET", "/")
        found = connection.sock.getpeercert()["serialNumber"]
        assert connection.getresponse().status == 200
        connection.close()
        return found

    async def run():
        async with status_server(EngineDouble(), tls=TlsFiles(pair.cert, pair.key)) as server:
            assert server.page.url.startswith("https://")
            seen = [await asyncio.to_thread(serial, server.page.url) for _ in range(2)]
            trusted.issue("127.0.0.1", file="page")
            seen += [await asyncio.to_thread(serial, server.page.url)]
            pair.cert.write_text("nonsense")
            return [*seen, await asyncio.to_thread(serial, server.page.url)]

    first, second, renewed, kept = asyncio.run(run())
    assert first == second != renewed == kept


def test_browsers_need_a_certificate_if_clients_do(trusted):
    pair, own = trusted.issue("127.0.0.1", file="both"), trusted.issue("me")
    files = TlsFiles(pair.cert, pair.key, trusted.file)

    async def run():
        async with status_server(EngineDouble(), tls=files) as server:
            with_own = ssl.create_default_context(cafile=trusted.file)
            with_own.load_cert_chain(own.cert, own.key)
            assert (await server.get("/", context=with_own)).code == 200
            without = ssl.create_default_context(cafile=trusted.file)
            with pytest.raises(OSError, match=r"(?i)certificate|reset|EOF|closed|broken pipe"):
                await server.get("/", context=without)

    asyncio.run(run())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_of_before_opens_nothing_once_another_authority_signs(tmp_path, version):
    one, two = certificates.authority(tmp_path / "one"), certificates.authority(tmp_path / "two")
    pair, own = one.issue("localhost"), one.issue("me")
    signs = tmp_path / "signs.pem"
    signs.write_bytes(one.file.read_bytes())
    context = ssl.create_default_context(cafile=one.file)
    context.load_cert_chain(own.cert, own.key)
    context.maximum_version = version

    def talk(url, session=None):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with (
            socket.create_connection(address, timeout=5) as plain,
            context.wrap_socket(
                plain, server_hostname="localhost", session=session, suppress_ragged_eofs=False
            ) as secure,
        ):
            secure.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: secure.recv(1 << 16), b""))
            kept = secure.session
            secure.unwrap()  # a session that was not ended in order is forgotten
            return answer[:12], kept

    async def run():
        async with status_server(
            EngineDouble(), tls=TlsFiles(pair.cert, pair.key, signs)
        ) as server:
            answer, session = await asyncio.to_thread(talk, server.page.url)
            assert answer == b"HTTP/1.1 200"
            signs.write_bytes(two.file.read_bytes())
            with pytest.raises(OSError, match=r"(?i)unknown ca|reset|EOF|closed|broken pipe"):
                await asyncio.to_thread(talk, server.page.url, session)

    asyncio.run(run())


# From the start of a server to its end.


def test_a_server_has_its_page_until_it_ends(monkeypatch):
    monkeypatch.setattr(serving, "_exit_after", lambda seconds: None)
    where = f"127.0.0.1:{free_port()}"

    async def run():
        engine, policy = EngineDouble(), Policy()
        server = serving.make_server(ModelCache(engine, policy), engine, policy)
        settings = Settings(listen="127.0.0.1:0", status_listen=where, drain_seconds=0.0)
        task = asyncio.create_task(serving.serve(server, settings))
        code = await asyncio.to_thread(code_of, where)
        while (handler := signal.getsignal(signal.SIGTERM)) is signal.SIG_DFL:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return code, handler, await asyncio.wait_for(task, 10)

    code, handler, exit_code = asyncio.run(run())
    assert (code, exit_code) == (200, 0)
    assert "uvicorn" not in repr(handler)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2]))).close()


def code_of(where):
    for _ in range(500):
        connection = http.client.HTTPConnection(where, timeout=10)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().status
        except ConnectionRefusedError:
            time.sleep(0.01)
        finally:
            connection.close()
    raise AssertionError("nobody listens")


def test_a_port_in_use_is_an_error_at_the_start(capsys):
    async def run(where):
        engine, policy = EngineDouble(), Policy()
        server = serving.make_server(ModelCache(engine, policy), engine, policy)
        return await serving.serve(server, Settings(listen="127.0.0.1:0", status_listen=where))

    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        assert asyncio.run(run(where)) == 1
    assert f"moorage serve: cannot listen on {where}: " in capsys.readouterr().err
