"""Answers over the wire whose connection breaks, anywhere."""

# ruff: noqa: F401, F811 (fixtures are imported)
from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest

import moorage
from conftest import GOLDEN
from golden_server import bad, client, load, server
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_server import serving as server_parts
from moorage_server.scheduler import Scheduler
from server_process import server_process
from server_thread import channel_to, serving
from test_scheduler import Wide

ROWS = [[row + 2, *range(2, 101)] for row in range(60)]  # of 128 kB: 8 MB, in 8 chunks
WHOLE = np.repeat(-np.float32(ROWS).reshape(-1)[:, None], 320, 1).tobytes()


@pytest.fixture(scope="module")
def made():
    """A server, and its schedulers."""
    schedulers: list[Scheduler] = []

    def remember(*arguments, **options):
        schedulers.append(Scheduler(*arguments, **options))
        return schedulers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_parts, "Scheduler", remember)
        with serving(Wide(), GOLDEN) as running:
            running.schedulers = schedulers
            with moorage.connect(running.address) as connected:
                running.handle = load(connected).handle
            yield running


def request(made, request_id, **fields):
    tokens = [token for row in ROWS for token in row]
    fields = {"outputs": {"names": ["logits"]}, **fields}
    return pb.ForwardRequest(
        handle=made.handle,
        token_ids=tokens,
        row_lengths=[100] * len(ROWS),
        request_id=request_id,
        **fields,
    )


def read(channel, asked, most=10**9) -> bytes:
    """The bytes of so many chunks; then the call is cancelled."""
    call, chunks = pb_grpc.ScoringServiceStub(channel).Forward(asked), []
    for part in call:
        if part.WhichOneof("part") == "chunk":
            chunks.append(part.chunk.data)
            if len(chunks) >= most:
                call.cancel()
                break
    return b"".join(chunks)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_answer_that_is_cut_at_any_chunk(made):
    draw, before = random.Random(3), made.engine.count("forward")
    for number in range(5):
        data = b""
        while len(data) < len(WHOLE):
            with channel_to(made.address) as channel:
                asked = request(made, f"cut {number}", received_bytes=len(data))
                data += read(channel, asked, draw.randint(1, 4))
        assert data == WHOLE
    assert made.engine.count("forward") - before == 5 * 15  # 60 rows, four at a time


def test_the_rest_of_an_answer_from_any_byte(made):
    with channel_to(made.address) as channel:
        for received in (0, 1, 2**20 - 1, 2**20, 2**20 + 1, len(WHOLE) - 1, len(WHOLE)):
            asked = request(made, "rest", received_bytes=received)
            assert read(channel, asked) == WHOLE[received:]


def test_chunks_say_where_they_belong(made):
    outputs = {"names": ["logits", "logprobs"]}
    asked = request(made, "places", outputs=outputs, received_bytes=2**20 + 5)
    with channel_to(made.address) as channel:
        _, *parts = pb_grpc.ScoringServiceStub(channel).Forward(asked)
    places = [(part.chunk.tensor, part.chunk.offset, len(part.chunk.data)) for part in parts]
    end = 2**20 + 5
    for tensor, offset, size in places[:-1]:
        assert (tensor, offset) == (0, end)
        assert 0 < size <= 2**20
        end += size
    assert end == len(WHOLE)
    assert places[-1] == (1, 0, 60 * 100 * 4)


def test_who_does_not_read_and_goes_leaves_nothing_behind(made):
    (scheduler,) = made.schedulers
    # A window that does not grow, so that no answer fits in it.
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(made.address, options=narrow) as channel:
        calls = [
            pb_grpc.ScoringServiceStub(channel).Forward(request(made, f"deaf {n}"))
            for n in range(4)
        ]
        for call in calls:
            next(call)
        until(lambda: scheduler.callers == 4)
        calls.pop().cancel()
        until(lambda: scheduler.callers == 3)
    until(lambda: scheduler.callers == 0)
    assert scheduler.queue.tokens == 0


def test_a_deadline_that_passes_ends_the_request(made):
    (scheduler,) = made.schedulers
    made.engine.hold("forward")
    try:
        with channel_to(made.address) as channel:
            scoring = pb_grpc.ScoringServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                list(scoring.Forward(request(made, "late"), timeout=0.3))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: scheduler.queue.tokens == 0 and scheduler.callers == 0)
    finally:
        made.engine.release()
    with channel_to(made.address) as channel:
        assert read(channel, request(made, "late")) == WHOLE


def test_the_client_library_gives_the_same(made):
    with moorage.connect(made.address) as connected:
        logits = connected.forward(made.handle, ROWS, ["logits"]).logits
    assert b"".join(row.tobytes() for row in logits) == WHOLE


# With processes, and numbers of a real engine.


@pytest.mark.soak
def test_merged_requests_have_the_bits_of_lone_ones(client):
    rng, model = np.random.default_rng(5), load(client)
    kinds = [
        {},
        {"temperature": 0.7},
        {"outputs": ["logits", "entropy"]},
        {"outputs": (), "top_k": 5, "temperature": 1.3},
        {"outputs": (), "candidates": [3, 4, 5]},
        {"outputs": ["hidden"], "layer": 1},
    ]
    asked = [
        ([rng.integers(0, 320, length) for length in rng.integers(1, 128, 3)], kinds[n % 6])
        for n in range(48)
    ]
    alone = [model.forward(some, **options) for some, options in asked]
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda one: model.forward(one[0], **one[1]), asked * 4))
    for one, other in zip(alone * 4, together, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        for name, rows in one.tensors.items():
            assert [row.tobytes() for row in rows] == [row.tobytes() for row in other.tensors[name]]


CLIENT = """
import sys
from moorage.v1 import moorage_pb2 as pb, moorage_pb2_grpc as pb_grpc
import grpc
asked = pb.ForwardRequest.FromString(sys.stdin.buffer.read())
with grpc.insecure_channel(sys.argv[1]) as channel:
    for part in pb_grpc.ScoringServiceStub(channel).Forward(asked):
        sys.stdout.buffer.write(part.chunk.data)
        sys.stdout.flush()
"""


@pytest.mark.soak
def test_a_client_that_is_killed_and_started_again(made):
    draw, before = random.Random(4), made.engine.count("forward")
    for number in range(10):
        data = b""
        while len(data) < len(WHOLE):
            asked = request(made, f"killed {number}", received_bytes=len(data))
            process = subprocess.Popen(
                [sys.executable, "-c", CLIENT, made.address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            if len(data) == 0 or draw.random() < 0.7:  # else to its end
                timer = threading.Timer(0.3 + draw.random(), process.kill)
                timer.start()
            data += process.communicate(asked.SerializeToString())[0]
        assert data == WHOLE
    assert made.engine.count("forward") - before == 10 * 15


@pytest.mark.soak
def test_a_server_that_is_killed_in_mid_answer(tmp_path: Path):
    flags, draw = ("--state", str(tmp_path / "state"), "--restore"), random.Random(5)
    rows = [[n % 300 + 2] * 120 for n in range(800)]
    with ExitStack() as stack:
        running = stack.enter_context(server_process(GOLDEN, tmp_path, *flags, buckets="8x128"))
        address = running.address
        connected = stack.enter_context(moorage.connect(address, timeout=120))
        model, pool = load(connected), stack.enter_context(ThreadPoolExecutor(1))
        expected = model.forward(rows, ["logits"]).logits
        begin = time.monotonic()
        model.forward(rows, ["logits"])
        whole = time.monotonic() - begin
        cut = 0
        for _ in range(5):
            answer = pool.submit(model.forward, rows, ["logits"])
            time.sleep(draw.uniform(0.05, 0.5) * whole)
            running.kill()
            cut += not answer.done()
            running = stack.enter_context(
                server_process(GOLDEN, tmp_path, *flags, address=address, buckets="8x128")
            )
            for one, other in zip(answer.result(60).logits, expected, strict=True):
                assert one.tobytes() == other.tobytes()
        assert cut >= 2
