"""Forward passes of both clients against a server in this process: broken, busy, split, many."""

import asyncio
import concurrent.futures
import gc
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

import moorage
from moorage import packing, passes
from moorage.v1 import moorage_pb2 as pb
from test_client import LOGPROBS, ROWS, ask, fail, forward, parts, quick, serving

__all__ = ["ask", "quick"]


def computed(request: pb.ForwardRequest, **header) -> list[pb.ForwardResponse]:
    """An answer that tells whose it is: halves of the token ids, and places within the request."""
    ids = np.array(request.token_ids, np.float32)
    places = np.stack([ids, -ids], axis=1)
    answer = parts(lengths=request.row_lengths, chunk=64, logprobs=ids / 2, hidden=places)
    answer[0].header.request_id = request.request_id
    answer[0].header.MergeFrom(pb.ForwardHeader(**header))
    return answer


def going_on(answer, request):
    """What is left of an answer of one tensor."""
    return [answer[0], *(m for m in answer[1:] if m.chunk.offset >= request.received_bytes)]


class Hanging:
    """A server whose passes run until they are cancelled."""

    def __init__(self) -> None:
        self.running, self.cancelled = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, request, context):
        ended = threading.Event()
        if not context.add_callback(ended.set):
            ended.set()  # the call has ended already
        self.running.release()
        ended.wait(10)
        self.cancelled.release()
        return iter(())


# A connection that breaks, and a server that is busy.


def test_a_broken_call_goes_on_where_it_was(ask, quick):
    breaks = [2, 1, 9]

    def breaking(request, context):
        messages = breaks.pop(0)
        yield from going_on(parts(logprobs=LOGPROBS), request)[:messages]
        if messages < 9:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    with serving(Forward=breaking) as fake:
        found = ask(fake.address, "forward", "a1b2", ROWS)
    np.testing.assert_array_equal(np.concatenate(found.logprobs), LOGPROBS)
    assert [request.received_bytes for request in fake.requests] == [0, 8, 8]
    assert len({request.request_id for request in fake.requests}) == 1


def test_bytes_that_came_damaged_are_asked_for_again(ask):
    damaged = [True]

    def damaging(request, context):
        answer = going_on(parts(logprobs=LOGPROBS), request)
        if damaged:
            answer[2].chunk.crc32c ^= damaged.pop()
        return iter(answer)

    with serving(Forward=damaging) as fake:
        found = ask(fake.address, "forward", "a1b2", ROWS)
    np.testing.assert_array_equal(np.concatenate(found.logprobs), LOGPROBS)
    assert [request.received_bytes for request in fake.requests] == [0, 8]


@pytest.mark.parametrize(
    ("code", "reason"), [("RESOURCE_EXHAUSTED", "QUEUE_FULL"), ("UNAVAILABLE", "SERVER_DRAINING")]
)
def test_a_busy_server_is_asked_again_when_it_says(ask, code, reason):
    times = []

    def busy(request, context):
        times.append(time.monotonic())
        if len(times) < 3:
            fail(context, grpc.StatusCode[code], "later", reason, retry=0.03)
        yield from forward(request, context)

    with serving(Forward=busy) as fake:
        found = ask(fake.address, "forward", "a1b2", ROWS)
    assert found.logprobs[0][1] == -1.5
    assert (np.diff(times) >= 0.03).all()
    assert fake.requests[0] == fake.requests[1] == fake.requests[2]


def test_a_busy_server_is_not_waited_for_beyond_the_time(ask):
    def busy(request, context):
        fail(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "later", "QUEUE_FULL", retry=60)
        yield

    with (
        serving(Forward=busy) as fake,
        pytest.raises(moorage.ResourceExhausted, match="later") as caught,
    ):
        ask(fake.address, "forward", "a1b2", ROWS, timeout=5)
    assert caught.value.retry_after == 60


@contextmanager
def free_address():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{unused.getsockname()[1]}"


def test_a_server_that_never_answered_is_not_waited_for(ask):
    with free_address() as address, pytest.raises(moorage.Unavailable, match="moorage serve"):
        ask(address, "forward", "a1b2", ROWS)


def info(request, context):
    return pb.GetServerInfoResponse()


answered = pytest.mark.parametrize(
    ("method", "arguments"), [("info", ()), ("forward", ("a1b2", ROWS))], ids=["info", "forward"]
)


@answered
def test_a_server_that_restarts_is_waited_for(quick, method, arguments):
    with serving(GetServerInfo=info, Forward=forward) as first:
        client = moorage.connect(first.address)
        getattr(client, method)(*arguments)
    future = client.forward_async("a1b2", ROWS)
    time.sleep(0.05)
    assert not future.done()
    with serving(int(first.address.rpartition(":")[2]), Forward=forward):
        assert future.result(20).logprobs[0][1] == -1.5
    client.close()


@answered
def test_a_server_that_restarts_is_waited_for_in_asyncio(quick, method, arguments):
    async def run():
        with serving(GetServerInfo=info, Forward=forward) as first:
            client = moorage.aio.connect(first.address)
            await getattr(client, method)(*arguments)
        task = asyncio.create_task(client.forward("a1b2", ROWS))
        await asyncio.sleep(0.05)
        assert not task.done()
        with serving(int(first.address.rpartition(":")[2]), Forward=forward):
            found = await asyncio.wait_for(task, 20)
            await client.close()
        return found

    assert asyncio.run(run()).logprobs[0][1] == -1.5


@pytest.mark.parametrize("timeout", [0.1, None])
def test_a_call_has_a_time_of_its_own(timeout):
    """The client's own time is the other of the two."""
    hanging = Hanging()
    with (
        serving(Forward=hanging) as fake,
        moorage.connect(fake.address, timeout=0.1 if timeout is None else None) as client,
    ):
        future = client.forward_async("a1b2", ROWS, timeout=timeout)
        if timeout is None:
            assert not concurrent.futures.wait([future], 0.3).done
        else:
            with pytest.raises(moorage.DeadlineExceeded, match="give the call"):
                future.result(10)


# Splitting.


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(packing, "MAX_TOKENS", 10)
    monkeypatch.setattr(packing, "ROW_TOKENS", 1)


MANY = [np.arange(n) + 100 * n for n in (7, 9, 2, 8, 10, 1, 1, 14, 5, 3)]


def test_a_split_batch_gives_what_one_request_gives(ask, monkeypatch):
    def answering(request, context):
        return iter(computed(request))

    with serving(Forward=answering) as fake:
        whole = ask(fake.address, "forward", "a1b2", MANY, ["logprobs", "hidden"])
        assert len(fake.requests) == 1
        monkeypatch.setattr(packing, "MAX_TOKENS", 10)
        monkeypatch.setattr(packing, "ROW_TOKENS", 1)
        split = ask(fake.address, "forward", "a1b2", MANY, ["logprobs", "hidden"])
    assert len(fake.requests) == 1 + 7
    assert list(split.tensors) == ["logprobs", "hidden"]
    for name, arrays in whole.tensors.items():
        assert len(split.tensors[name]) == len(arrays) == 10
        for one, other in zip(arrays, split.tensors[name], strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(split.logprobs[2], [100, 100.5])
    sent = {request.request_id for request in fake.requests[1:]}
    assert set(split.request_id.split(",")) == sent
    assert len(sent) == 7


def test_times_and_buckets_of_a_split_batch(ask, small):
    def answering(request, context):
        rows = len(request.row_lengths)
        header = {"buckets": [pb.Bucket(rows=rows, length=16)], "queue_time": {"seconds": rows}}
        return iter(computed(request, **header))

    with serving(Forward=answering) as fake:
        found = ask(fake.address, "forward", "a1b2", [[1] * 6, [1] * 5, [1] * 5], ["hidden"])
    assert found.times == moorage.Times(queue=2.25, pad=1.0, execute=3.5, transfer=0.25)
    assert found.buckets == ((2, 128), (1, 16), (2, 16))


def refusing(rows, seen):
    """A server that refuses answers for more rows than so many."""

    def answering(request, context):
        seen.append(len(request.row_lengths))
        if seen[-1] > rows:
            code, limit = grpc.StatusCode.INVALID_ARGUMENT, {"limit": "64"}
            fail(context, code, "it would have 99 bytes", "OUTPUT_TOO_LARGE", details=limit)
        yield from computed(request)

    return answering


@pytest.mark.parametrize("tokens", [10, 1000])
def test_a_request_whose_answer_is_too_large_is_cut_in_two(ask, monkeypatch, tokens):
    seen = []
    monkeypatch.setattr(packing, "ROW_TOKENS", 1)
    monkeypatch.setattr(packing, "MAX_TOKENS", tokens)
    with serving(Forward=refusing(1, seen)) as fake:
        found = ask(fake.address, "forward", "a1b2", MANY, ["hidden"])
    for row, hidden in zip(MANY, found.hidden, strict=True):
        np.testing.assert_array_equal(hidden, np.stack([row, -row], axis=1))
    assert seen.count(1) == len(MANY)
    assert len({request.request_id for request in fake.requests}) == len(seen)


def test_a_row_whose_answer_is_too_large_is_an_error(ask):
    seen = []
    with (
        serving(Forward=refusing(0, seen)) as fake,
        pytest.raises(moorage.InvalidRequest, match="99 bytes") as caught,
    ):
        ask(fake.address, "forward", "a1b2", MANY, ["hidden"])
    assert (caught.value.reason, caught.value.details["limit"]) == ("OUTPUT_TOO_LARGE", "64")
    assert seen == [10, 5, 2, 1]


def test_weights_that_change_within_a_batch_are_an_error(ask, small):
    def answering(request, context):
        return iter(computed(request, weights_version=2 if request.token_ids[0] == 1400 else 1))

    with (
        serving(Forward=answering) as fake,
        pytest.raises(moorage.FailedPrecondition, match="weights changed") as caught,
    ):
        ask(fake.address, "forward", "a1b2", MANY, ["hidden"])
    assert caught.value.reason == "WEIGHTS_VERSION_MISMATCH"


def test_answers_of_a_batch_hold_the_same_tensors(ask, small):
    def answering(request, context):
        name = {} if request.token_ids[0] == 1 else {"more": np.zeros(10, np.float32)}
        return iter(parts(lengths=[10], logprobs=np.zeros(10, np.float32), **name))

    with serving(Forward=answering) as fake, pytest.raises(moorage.DataLoss, match="more"):
        ask(fake.address, "forward", "a1b2", [[1] * 10, [2] * 10])


def test_four_requests_of_a_batch_are_in_flight(ask, small):
    barrier, running, most = threading.Barrier(4), [], []

    def meeting(request, context):
        running.append(request)
        most.append(len(running))
        barrier.wait(10)
        running.remove(request)
        return iter(computed(request))

    with serving(Forward=meeting) as fake:
        ask(fake.address, "forward", "a1b2", [[i] * 10 for i in range(8)], ["hidden"])
    assert max(most) == 4
    assert len(fake.requests) == 8


def test_the_first_failure_ends_a_batch(ask, small):
    cancelled = threading.Semaphore(0)

    def failing(request, context):
        if not context.add_callback(cancelled.release):
            cancelled.release()  # it has ended already
        if request.token_ids[0] == 2:
            fail(context, grpc.StatusCode.INVALID_ARGUMENT, "row 0", "TOKEN_OUT_OF_RANGE")
        released.wait(10)
        return iter(())

    released = threading.Event()
    with serving(Forward=failing) as fake:
        with pytest.raises(moorage.InvalidRequest, match="row 0"):
            ask(fake.address, "forward", "a1b2", [[i] * 10 for i in range(9)], ["hidden"])
        for _ in range(len(fake.requests)):
            assert cancelled.acquire(timeout=10)
        released.set()
    assert len(fake.requests) <= 5


# Futures.


def test_many_are_in_flight():
    barrier = threading.Barrier(8)

    def meeting(request, context):
        barrier.wait(10)
        return iter(computed(request))

    with serving(Forward=meeting) as fake, moorage.connect(fake.address) as client:
        futures = [client.forward_async("a1b2", [[i]], ["hidden"]) for i in range(64)]
        values = [future.result(20).logprobs[0][0] for future in futures]
    assert values == [i / 2 for i in range(64)]


def test_scores_are_freed_with_their_future():
    with serving(Forward=forward) as fake, moorage.connect(fake.address) as client:
        future = client.forward_async("a1b2", ROWS)
        buffer = weakref.ref(future.result(10).logprobs[0].base)
        gc.disable()
        try:
            del future
            deadline = time.monotonic() + 5
            while buffer() is not None and time.monotonic() < deadline:
                time.sleep(0.001)  # its thread lets go of it
            assert buffer() is None
        finally:
            gc.enable()


def test_a_future_has_the_error_of_its_call():
    def failing(request, context):
        fail(context, grpc.StatusCode.NOT_FOUND, "gone", "MODEL_NOT_LOADED")
        yield

    with serving(Forward=failing) as fake, moorage.connect(fake.address) as client:
        assert isinstance(client.forward_async("a1b2", ROWS).exception(10), moorage.NotFound)
        with pytest.raises(moorage.InvalidRequest):
            client.forward_async("a1b2", [])


def test_a_running_future_is_cancelled():
    hanging = Hanging()
    with serving(Forward=hanging) as fake, moorage.connect(fake.address) as client:
        future = client.forward_async("a1b2", ROWS)
        assert hanging.running.acquire(timeout=10)
        assert future.cancel()
        assert future.cancel()
        assert future.cancelled()
        assert concurrent.futures.wait([future], timeout=10).done == {future}
        assert hanging.cancelled.acquire(timeout=10)
        with pytest.raises(concurrent.futures.CancelledError):
            future.result()


@pytest.mark.parametrize("ending", ["", "raise RuntimeError('a bug')"])
def test_a_process_that_ends_waits_for_no_future(ending):
    code = f"""
import sys, moorage
client = moorage.connect(sys.argv[1])
waiting = [client.forward_async("a1b2", [[1, 2]]) for _ in range(40)]
sys.stdin.readline()
{ending}
"""
    hanging = Hanging()
    with serving(Forward=hanging) as fake:
        command = [sys.executable, "-c", code, fake.address]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            assert hanging.running.acquire(timeout=20)
            start = time.monotonic()
            err = child.communicate("\n", timeout=20)[1]
            assert time.monotonic() - start < 5
    assert child.returncode == (1 if ending.startswith("raise") else 0)
    assert err == "" or err.endswith("RuntimeError: a bug\n")


def test_a_process_that_ends_may_still_ask():
    code = """
import atexit, sys, moorage

@atexit.register
def last():
    with moorage.connect(sys.argv[1]) as client:
        print(client.forward("a1b2", [[2, 651, 5277], [2, 1841]]).logprobs[0][1])
"""
    with serving(Forward=forward) as fake:
        command = [sys.executable, "-c", code, fake.address]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (ended.stdout, ended.stderr) == ("-1.5\n", "")


def test_a_waiting_future_is_cancelled_and_never_sent(monkeypatch):
    monkeypatch.setattr(passes, "THREADS", 1)
    hanging = Hanging()
    with serving(Forward=hanging) as fake, moorage.connect(fake.address) as client:
        first = client.forward_async("a1b2", ROWS)
        assert hanging.running.acquire(timeout=10)
        second, third = (client.forward_async("a1b2", ROWS) for _ in range(2))
        assert second.cancel()
        assert second in concurrent.futures.wait([first, second], 1, "FIRST_COMPLETED").done
        first.cancel()
        assert hanging.running.acquire(timeout=10)
        third.cancel()
    assert len(fake.requests) == 2


def test_the_time_of_a_future_runs_while_it_waits_for_its_turn(monkeypatch):
    monkeypatch.setattr(passes, "THREADS", 1)
    released = threading.Event()

    def answering(request, context):
        released.wait(10)
        return forward(request, context)

    with serving(Forward=answering) as fake, moorage.connect(fake.address) as client:
        first = client.forward_async("a1b2", ROWS)
        second = client.forward_async("a1b2", ROWS, timeout=0.1)
        time.sleep(0.2)
        released.set()
        with pytest.raises(moorage.DeadlineExceeded, match="longer timeout"):
            second.result(10)
        assert first.result(10).logprobs[0][1] == -1.5


def test_a_future_that_is_done_is_not_cancelled():
    with serving(Forward=forward) as fake, moorage.connect(fake.address) as client:
        future = client.forward_async("a1b2", ROWS)
        future.result(10)
        assert not future.cancel()
        assert not future.cancelled()


def moorage_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "moorage" in thread.name]


def test_close_cancels_what_runs():
    hanging = Hanging()
    with serving(Forward=hanging) as fake:
        client = moorage.connect(fake.address)
        futures = [client.forward_async("a1b2", ROWS) for _ in range(3)]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            blocking = pool.submit(client.forward, "a1b2", ROWS)
            for _ in range(4):
                assert hanging.running.acquire(timeout=10)
            client.close()
            with pytest.raises(moorage.Cancelled):
                blocking.result(10)
        assert all(future.cancelled() for future in futures)
    assert moorage_threads() == []
    for call in (client.forward, client.forward_async):
        with pytest.raises(moorage.FailedPrecondition, match="closed"):
            call("a1b2", ROWS)


def test_close_wakes_what_waits_to_try_again():
    with serving(GetServerInfo=info) as fake:
        client = moorage.connect(fake.address)
        client.info()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        blocking = pool.submit(client.forward, "a1b2", ROWS)
        future = client.forward_async("a1b2", ROWS)
        time.sleep(0.3)
        begin = time.monotonic()
        client.close()
        with pytest.raises(moorage.Cancelled):
            blocking.result(10)
    assert future.cancelled()
    assert time.monotonic() - begin < 0.2


def test_a_cancelled_task_cancels_its_calls(small):
    hanging = Hanging()

    async def run(address, rows):
        async with moorage.aio.connect(address) as client:
            task = asyncio.create_task(client.forward("a1b2", rows))
            for _ in rows:
                assert await asyncio.to_thread(hanging.running.acquire, timeout=10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in rows:
                assert await asyncio.to_thread(hanging.cancelled.acquire, timeout=10)

    with serving(Forward=hanging) as fake:
        asyncio.run(run(fake.address, [[1]]))
        asyncio.run(run(fake.address, [[1] * 10, [2] * 10, [3] * 10]))


def test_many_are_in_flight_in_asyncio():
    barrier = threading.Barrier(8)

    def meeting(request, context):
        barrier.wait(10)
        return iter(computed(request))

    async def run(address):
        async with moorage.aio.connect(address) as client:
            passes = (client.forward("a1b2", [[i]], ["hidden"]) for i in range(32))
            return [found.logprobs[0][0] for found in await asyncio.gather(*passes)]

    with serving(Forward=meeting) as fake:
        assert asyncio.run(run(fake.address)) == [i / 2 for i in range(32)]


def test_close_ends_what_runs_in_asyncio():
    hanging = Hanging()

    async def run(address):
        client = moorage.aio.connect(address)
        task = asyncio.create_task(client.forward("a1b2", ROWS))
        assert await asyncio.to_thread(hanging.running.acquire, timeout=10)
        await client.close()
        with pytest.raises(moorage.Cancelled):
            await asyncio.wait_for(task, 10)

    with serving(Forward=hanging) as fake:
        asyncio.run(run(fake.address))


def test_a_task_that_is_cancelled_as_its_client_closes_is_cancelled():
    hanging = Hanging()

    async def run(address):
        client = moorage.aio.connect(address)
        task = asyncio.create_task(client.forward("a1b2", ROWS))
        assert await asyncio.to_thread(hanging.running.acquire, timeout=10)
        task.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await task

    with serving(Forward=hanging) as fake:
        asyncio.run(run(fake.address))


def test_close_wakes_what_waits_to_try_again_in_asyncio():
    async def run():
        with serving(GetServerInfo=info) as fake:
            client = moorage.aio.connect(fake.address)
            await client.info()
        task = asyncio.create_task(client.forward("a1b2", ROWS))
        await asyncio.sleep(0.3)
        begin = time.monotonic()
        await client.close()
        with pytest.raises(moorage.Cancelled):
            await asyncio.wait_for(task, 10)
        assert time.monotonic() - begin < 0.2

    asyncio.run(run())


def test_an_asyncio_client_that_is_closed_says_so():
    async def run(address):
        client = moorage.aio.connect(address)
        await client.close()
        with pytest.raises(moorage.FailedPrecondition, match="closed"):
            await client.forward("a1b2", ROWS)

    asyncio.run(run("127.0.0.1:1"))
