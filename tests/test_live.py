"""`moorage ps --watch`: what it draws, and how it goes on asking."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from rich.console import Console

import moorage
from conftest import GOLDEN
from engine_double import EngineDouble
from moorage import cli, watching
from moorage.answers import Lease, LoadProgress, Model, Stage, Tokenizer
from moorage.live import Snapshot, picture
from moorage.naming import Config
from moorage.server_info import Activity, Device, Limits, Memory, RecentError, ServerInfo
from moorage.v1 import moorage_pb2 as pb
from server_thread import serving as serving_engine
from test_client import serving

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GIB = 1 << 30


def before(**time: float) -> datetime:
    return NOW - timedelta(**time)


READY = Model(
    handle="7b05dfd52e9b",
    state="ready",
    model_id="meta-llama/Llama-3.1-8B-Instruct",
    model_config_id="",
    source="huggingface",
    path="",
    revision="",
    config=Config("llama3", 1, 2, 3, 4, 5, 6, 7, 8),
    dtype="bfloat16",
    compute_dtype="bfloat16",
    device_bytes={0: 2 * GIB, 1: 2 * GIB},
    load_time=before(hours=1),
    load_seconds=12.0,
    last_use_time=before(seconds=125),
    forward_count=104_233,
    token_count=123_456_789,
    progress=None,
    preset_differences=(),
    tokenizer=Tokenizer((), None, (), None, False),
    leases=(Lease("", "run7", 60.0, 42.4),),
    history={},
    running_count=3,
    reserved_bytes=3 * GIB,
    requested_by="",
    buckets=((1, 128),),
    client=None,
)
LOADING = replace(
    READY,
    handle="c3c3c3c3c3c3",
    state="loading",
    model_id="google/gemma-2-2b",
    dtype="float32",
    device_bytes={},
    leases=(),
    running_count=0,
    forward_count=0,
    token_count=0,
    last_use_time=None,
    progress=LoadProgress(
        "loading",
        {
            "fetch": Stage(8 * GIB, 8 * GIB, 512.0 * (1 << 20)),
            "place": Stage(2 * GIB, 8 * GIB, GIB / 2),
            "compile": Stage(3, 12, 0.1),
        },
        1,
        20.0,
    ),
)
INFO = ServerInfo(
    version="0.1.0",
    platform="tpu",
    devices=(Device(0, "TPU v4", 2 * GIB), Device(1, "TPU v4", 2 * GIB)),
    mesh={"fsdp": 1, "tp": 2},
    buckets=((4, 512),),
    max_message_bytes=4 << 20,
    max_sequence_length=512,
    max_output_bytes=1 << 20,
    max_queued_tokens=65_536,
    answer_retention_seconds=90.0,
    max_retained_bytes=GIB,
    max_waiting_bytes=4 * GIB,
    sources=("huggingface",),
    outputs=("logprobs",),
    start_time=before(hours=3, minutes=4),
    memory=Memory(8 * GIB, 4 * GIB, {0: 2 * GIB, 1: 6 * GIB}, 0),
    profiles=(),
    compiles_after_ready=0,
    limits=Limits(4096, 1024, 1 << 20, 1000, 64, 60, 900, 256),
    activity=Activity(
        requests=7,
        forwards_under_way=5,
        queued_tokens=12_345,
        leases=1,
        forwards=104_233,
        tokens=123_456_789,
        batches=2_000,
        batch_tokens=750,
        batch_slots=1_000,
        loads={"READY": 2},
        refusals={"LIMIT_EXCEEDED": 1, "QUEUE_FULL": 12_000},
        errors=(
            RecentError(before(hours=2), "Forward", "QUEUE_FULL", "wait", "r1", "ipv4:10.0.0.7:80"),
            RecentError(before(seconds=7), "LoadModel", "DISK_FULL", "no room", "r2", "team-a"),
        ),
    ),
)
SEEN = Snapshot("tpu-host:8470", INFO, (READY, LOADING), time=NOW)

WIDE = """\
tpu-host:8470  v0.1.0  tpu  fsdp=1 tp=2  up 3 h 4 min

█ arrays  ▒ reserved 4.0 GiB  ░ of 8.0 GiB on each device
  0 ██████████▒▒▒▒▒▒▒▒▒▒░░░░░░░░░░░░░░░░░░░░ 2.0 GiB     1 ██████████████████████████████░░░░░░░░░░ 6.0 GiB

HANDLE        MODEL                             STATE        DTYPE  EACH/ALL     LEASES     USED   RUN  FWDS    TOKENS
7b05dfd52e9b  meta-llama/Llama-3.1-8B-Instruct  ready        bf16   2.0/4.0 GiB  run7 42 s  2 min    3  104.2k  123.5M
c3c3c3c3c3c3  google/gemma-2-2b                 loading 25%  f32    -            -          -        0  0       0
  fetch    ████████████████████████████████████████  8.0 GiB        512.0 MiB/s
  place    ██████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░  2.0/8.0 GiB    512.0 MiB/s  12 s left
  compile  ██████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░  3/12 programs  0.1/s        1 min left

under way  7 of 4096 requests, 5 of them forward passes
queued     12.3k of 65.5k tokens
leases     1 of 900
answered   104.2k forward passes, 123.5M tokens
batches    2000, 75% full
loads      2 READY
refused    12.0k QUEUE_FULL, 1 LIMIT_EXCEEDED

AGO    METHOD     REASON      CLIENT            MESSAGE
7.0 s  LoadModel  DISK_FULL   team-a            no room
2 h    Forward    QUEUE_FULL  ipv4:10.0.0.7:80  wait
"""  # noqa: E501

NARROW = """\
tpu-host:8470  v0.1.0  tpu  fsdp=1 tp=2  up 3 h 4 min

█ arrays  ▒ reserved 4.0 GiB  ░ of 8.0 GiB on each device
  0 ████▒▒▒░░░░░░░ 2.0 GiB     1 ██████████░░░░ 6.0 GiB

MODEL                  STATE        EACH/ALL     RUN  TOKENS
…lama-3.1-8B-Instruct  ready        2.0/4.0 GiB    3  123.5M
google/gemma-2-2b      loading 25%  -              0  0
  fetch    ████████  8.0 GiB        512.0 MiB/s
  place    ██░░░░░░  2.0/8.0 GiB    512.0 MiB/s  12 s left
  compile  ██░░░░░░  3/12 programs  0.1/s        1 min left

under way  7 of 4096 requests, 5 of them forward passes
queued     12.3k of 65.5k tokens
leases     1 of 900
answered   104.2k forward passes, 123.5M tokens
batches    2000, 75% full
loads      2 READY
refused    12.0k QUEUE_FULL, 1 LIMIT_EXCEEDED

AGO    REASON      MESSAGE
7.0 s  DISK_FULL   no room
2 h    QUEUE_FULL  wait
"""


def text(seen: Snapshot, width: int = 120, height: int = 0) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(picture(seen, width, NOW, height))
    return capture.get()


# The picture.


@pytest.mark.parametrize(("width", "expected"), [(120, WIDE), (60, NARROW)])
def test_the_picture(width, expected):
    assert text(SEEN, width) == expected


@pytest.mark.parametrize("width", [20, 59, 71, 72, 80, 94, 100, 107, 108, 140, 300])
def test_no_line_is_wider_than_the_terminal_or_wrapped(width):
    lines = text(SEEN, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) - len(WIDE.splitlines()) == (1 if width < 56 else 0)  # a line a device


def test_states_have_colours():
    console = Console(width=120, color_system="standard", force_terminal=True)
    with console.capture() as capture:
        console.print(picture(SEEN, 120, NOW))
    assert "\x1b[32mready\x1b[0m" in capture.get()
    assert "\x1b[33mloading\x1b[0m 25%" in capture.get()


@pytest.mark.parametrize(
    ("seen", "seconds"),
    [(replace(SEEN, error="broken"), "0.0"), (replace(SEEN, time=before(seconds=12)), "12")],
)
def test_it_says_that_there_is_no_answer(seen, seconds):
    line = f"no answer for {seconds} s; waiting for the server"
    assert text(seen).splitlines()[1] == line
    assert "no answer" not in text(replace(SEEN, time=before(seconds=2)))


def test_a_server_that_has_nothing_yet():
    quiet = Activity(1, 0, 0, 0, 0, 0, 0, 0, 0, {}, {}, ())
    info = replace(INFO, devices=(), mesh={}, start_time=None, activity=quiet)
    drawn = text(replace(SEEN, info=replace(info, memory=Memory(0, 0, {}, 0)), models=()))
    assert drawn.endswith(
        "under way  1 of 4096 requests, 0 of them forward passes\n"
        "queued     0 of 65.5k tokens\n"
        "leases     0 of 900\n"
        "answered   0 forward passes, 0 tokens\n"
    )


def test_a_load_whose_size_is_not_known_yet():
    progress = LoadProgress("loading", {"fetch": Stage(GIB, 0, 0.0)}, 1, 1.0)
    (line,) = [
        line
        for line in text(replace(SEEN, models=(replace(LOADING, progress=progress),))).splitlines()
        if line.startswith("  fetch")
    ]
    assert line == f"  fetch  {'░' * 40}  1.0 GiB  0 B/s"


def test_of_many_models_a_low_terminal_shows_some():
    many = replace(SEEN, models=(READY,) * 50)
    lines = text(many, height=24).splitlines()
    assert len(lines) == 24
    assert [line.partition("  ")[0] for line in lines[5:13]] == [
        "HANDLE",
        *[READY.handle] * 5,
        "and 45 lines more",
        "",
    ]
    assert text(many, height=80) == text(many)


def test_of_many_errors_the_latest_are_shown():
    error = INFO.activity.errors[0]
    errors = tuple(replace(error, message=f"m{i}") for i in range(50))
    info = replace(INFO, activity=replace(INFO.activity, errors=errors))
    drawn = text(replace(SEEN, info=info))
    assert [line[-3:] for line in drawn.splitlines()[-5:]] == ["m49", "m48", "m47", "m46", "m45"]


def test_a_terminal_obeys_nothing_that_clients_write():
    error = replace(INFO.activity.errors[0], message="a\x1b[2J\nb\x9b2J", client="[red]c[/red]")
    info = replace(INFO, activity=replace(INFO.activity, errors=(error,)))
    drawn = text(replace(SEEN, info=info, models=(replace(READY, model_id="x\x1b]0;y\x07"),)))
    assert "\x1b" not in drawn
    assert "x�]0;y� " in drawn
    assert drawn.endswith("[red]c[/red]  a�[2J�b�2J\n")


# The loop.


class Stub:
    """A client that answers by script; `broken` is raised while it is set."""

    address = "tpu-host:8470"

    def __init__(self) -> None:
        self.broken: moorage.Error | None = None
        self.watches = 0
        self.changed = threading.Semaphore(0)
        self.answer = INFO

    def info(self) -> ServerInfo:
        if self.broken:
            raise self.broken
        return self.answer

    def models(self) -> list[Model]:
        return [READY]

    def watch(self):
        self.watches += 1
        while not self.broken:
            self.changed.acquire()
            yield None


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watching, "_PERIOD", 0.02)
    monkeypatch.setattr(watching, "_SHORTEST", 0.01)
    monkeypatch.setattr("moorage.transport.FIRST_PAUSE", 0.02)


def test_it_outlives_a_restart(quick):
    stub = Stub()
    asked = watching.snapshots(stub)
    first = next(asked)
    assert (first.server, first.info, first.models, first.error) == (
        "tpu-host:8470", INFO, (READY,), "",
    )  # fmt: skip
    stub.broken = moorage.Unavailable("gone")
    stub.changed.release()  # the watch ends as well
    waiting = next(asked)
    stub.broken = moorage.Unavailable("refused")
    assert next(asked) == waiting == replace(first, error="gone")
    assert waiting.time == first.time
    stub.broken, stub.answer = None, replace(INFO, version="0.2.0")
    back = next(asked)
    assert (back.info.version, back.error) == ("0.2.0", "")
    assert back.time > first.time
    next(asked)
    assert stub.watches >= 2


def test_it_ends_if_the_server_refuses(quick):
    stub = Stub()
    asked = watching.snapshots(stub)
    next(asked)
    stub.broken = moorage.Unauthenticated("who?", reason="UNAUTHENTICATED")
    with pytest.raises(moorage.Unauthenticated):
        next(asked)


def test_it_ends_if_there_is_no_answer_at_first(quick):
    stub = Stub()
    stub.broken = moorage.Unavailable("nothing there")
    with pytest.raises(moorage.Unavailable):
        next(watching.snapshots(stub))


def test_a_change_is_seen_at_once_but_not_more_often_than_is_good(monkeypatch):
    monkeypatch.setattr(watching, "_PERIOD", 30.0)
    monkeypatch.setattr(watching, "_SHORTEST", 0.1)
    stub = Stub()
    asked = watching.snapshots(stub)
    next(asked)
    for _ in range(3):
        stub.changed.release(100)
        begin = time.monotonic()
        next(asked)
        assert 0.1 <= time.monotonic() - begin < 5.0


class Enough(Exception):  # noqa: N818
    """Ends a watch."""


def printed(monkeypatch, as_json: bool, *seen: Snapshot) -> None:
    def script(_):
        yield from seen
        raise Enough

    monkeypatch.setattr(watching, "snapshots", script)
    with pytest.raises(Enough):
        watching.watch(SimpleNamespace(), as_json=as_json)


def test_json_is_a_line_for_each_change(monkeypatch, capsys):
    later = replace(SEEN, time=NOW + timedelta(seconds=1))
    printed(monkeypatch, True, SEEN, later, replace(later, error="gone"), SEEN)
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(first) == ["server", "info", "models", "error", "time"]
    assert first["info"]["activity"]["refusals"] == {"LIMIT_EXCEEDED": 1, "QUEUE_FULL": 12_000}
    assert [model["handle"] for model in first["models"]] == ["7b05dfd52e9b", "c3c3c3c3c3c3"]
    assert "client" not in first["models"][0]
    assert second == {**first, "error": "gone", "time": "2026-01-02T03:04:06+00:00"}
    assert third == first


@pytest.mark.parametrize("forced", ["", "1"])
def test_a_pipe_gets_plain_text_for_each_change(monkeypatch, capsys, forced):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", forced)
    printed(monkeypatch, False, SEEN, SEEN, replace(SEEN, models=()))
    out = capsys.readouterr().out
    assert out.startswith("2026-01-02 03:04:05 UTC\ntpu-host:8470  v0.1.0")
    assert out.count("2026-01-02 03:04:05 UTC\n") == 2
    assert out.count("google/gemma-2-2b") == 1
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 60


# The command.


@contextmanager
def ps_watch(address: str, *argv: str, stdout: int) -> Iterator[subprocess.Popen]:
    """The command in a process of its own, which has ended afterwards."""
    # A shell that starts tests in the background has them ignore SIGINT.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; import sys; from moorage import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "ps", "--watch", "--server", address, *argv]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "90", "LINES": "24"}
    with subprocess.Popen(
        command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def interrupted(child: subprocess.Popen) -> tuple[int, str]:
    """The exit code and stderr of a command after Ctrl-C."""
    child.send_signal(signal.SIGINT)
    err = child.stderr.read()
    return child.wait(30), err


def test_json_of_a_server():
    """A load is told of as it goes, then Ctrl-C ends the command."""
    engine = EngineDouble()
    engine.hold("place")
    with (
        serving_engine(engine, GOLDEN) as server,
        moorage.connect(server.address) as client,
        ps_watch(server.address, "--json", stdout=subprocess.PIPE) as child,
    ):
        assert json.loads(child.stdout.readline())["models"] == []
        release = threading.Timer(1.0, engine.release, ["place"])
        release.start()
        client.load("x", "internal", str(GOLDEN / "llama3"))
        release.join()
        states, seen = [], {}
        while states[-1:] != ["ready"]:
            seen = json.loads(child.stdout.readline())
            states += [model["state"] for model in seen["models"]]
        assert interrupted(child) == (130, "moorage: interrupted\n")
    assert "loading" in states
    assert seen["info"]["memory"]["live_bytes"] == {"0": 600, "1": 400}
    assert seen["info"]["activity"]["loads"] == {"READY": 1}


@contextmanager
def terminal():
    """The two ends of a terminal; what the child has written is read from the first."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def read_until(ours: int, wanted: str) -> str:
    seen, end = "", time.monotonic() + 30
    while wanted not in seen:
        assert time.monotonic() < end, seen
        if select.select([ours], [], [], 0.1)[0]:
            seen += os.read(ours, 1 << 16).decode(errors="replace")
    return seen


def test_a_terminal_is_drawn_on_and_left_as_it_was():
    answers = {
        "GetServerInfo": lambda *_: pb.GetServerInfoResponse(version="0.1.0", platform="cpu"),
        "ListModels": lambda *_: pb.ListModelsResponse(),
    }
    with (
        serving(**answers) as fake,
        terminal() as (ours, theirs),
        ps_watch(fake.address, stdout=theirs) as child,
    ):
        seen = read_until(ours, "forward passes")
        fake.server.stop(0).wait()
        read_until(ours, "waiting for the server")
        port = int(fake.address.rpartition(":")[2])
        with serving(port, **answers | {"GetServerInfo": restarted}):
            read_until(ours, "v0.2.0")
            assert interrupted(child) == (130, "moorage: interrupted\n")
            left = read_until(ours, "\x1b[?1049l")
    assert seen.startswith("\x1b[?1049h")
    assert f"{fake.address}  v0.1.0  cpu" in seen
    assert "\x1b[?25h" in left


def restarted(*_) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(version="0.2.0", platform="cpu")


def test_status_says_what_is_allowed_and_what_goes_on(capsys):
    response = pb.GetServerInfoResponse(
        limits=pb.Limits(
            max_queued_tokens=65_536,
            max_requests=4096,
            max_client_requests=1024,
            max_client_tokens=1 << 20,
            max_connections=1000,
            max_models=64,
            max_client_models=60,
            max_leases=900,
            max_client_leases=256,
        ),
        activity=pb.Activity(
            requests=7,
            forwards_under_way=5,
            queued_tokens=12_345,
            leases=2,
            forwards=3,
            tokens=40,
            batches=4,
            batch_tokens=30,
            batch_slots=40,
            refusals=[pb.Count(name="QUEUE_FULL", count=3)],
        ),
    )
    with serving(GetServerInfo=lambda *_: response) as fake:
        assert cli.main(["status", "--server", fake.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("host memory kept  0 B") + 1
    assert lines[begin : lines.index("", begin)] == [
        "clients may have  4096 requests, 1000 connections, 64 models, 900 leases",
        "one may have      1024 requests, 1.0M tokens waiting, 60 models, 256 leases",
        "under way         7 of 4096 requests, 5 of them forward passes",
        "queued            12.3k of 65.5k tokens",
        "leases            2 of 900",
        "answered          3 forward passes, 40 tokens",
        "batches           4, 75% full",
        "refused           3 QUEUE_FULL",
    ]


def test_only_who_watches_pays_for_rich():
    code = "import sys; import moorage, moorage.cli; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
