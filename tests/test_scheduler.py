"""Requests on their way to a device that a test holds, by the servicer itself."""

from __future__ import annotations

import asyncio
import functools
import time
from unittest import mock

import grpc
import numpy as np
import pytest

from cache_scenario import abandon, load, reached, refusal, scenario, settle, wanted
from engine_double import EngineDouble
from moorage.v1 import moorage_pb2 as pb
from moorage_models.checkpoint import open_checkpoint
from moorage_server import answers, scheduler, scoring_service
from moorage_server.access import Caller, Role
from moorage_server.cache import ModelCache
from moorage_server.calls import CURRENT, Call
from moorage_server.device_thread import DeviceThread
from moorage_server.draining import Draining
from moorage_server.engine import Answers
from moorage_server.errors import Reason, ServerError
from moorage_server.lifecycle import State
from moorage_server.model import Model
from moorage_server.scheduler import Scheduler
from moorage_server.scoring_service import ScoringService

NAN = np.nan
EXPIRING = mock.patch.object(scheduler, "RETENTION_SECONDS", 0.05)


@functools.cache
def checkpoint():
    return open_checkpoint(wanted())


def cache_of_one(engine):
    """The part of a cache that a servicer asks for a model; "m" is loaded."""
    cache = mock.create_autospec(ModelCache, instance=True)
    model = Model("m", checkpoint(), lambda model: None, State.READY, buckets=engine.info().buckets)
    cache.restored.return_value = True
    cache.ready.return_value = model
    cache.device_thread = DeviceThread()
    engine.loaded.add("m")
    return cache


class Desk:
    """A servicer, its scheduler, and a model that is ready."""

    def __init__(self, cache, engine, model, **limits):
        self.engine, self.model = engine, model
        self.scheduler = Scheduler(engine, cache.device_thread, **limits)
        self.service = ScoringService(cache, engine, self.scheduler, Draining())

    def request(self, *rows, **fields):
        tokens = [token for row in rows for token in row]
        lengths = [len(row) for row in rows]
        fields = {"handle": self.model.handle, **fields}
        return pb.ForwardRequest(token_ids=tokens, row_lengths=lengths, **fields)

    def ask(self, *rows, client="a", seconds=None, seen=None, **fields):
        """A task that gives the log-probabilities."""
        context = mock.create_autospec(grpc.aio.ServicerContext)
        context.time_remaining.return_value = seconds
        request = self.request(*rows, **fields)

        async def run():
            CURRENT.set(Call("Forward", "1", Caller(client, Role.SCORE)))
            data = b""
            async for part in self.service.Forward(request, context):
                data += part.chunk.data
                if seen is not None:
                    seen.append(part)
            return data if request.received_bytes else np.frombuffer(data, "<f4").tolist()

        return asyncio.create_task(run())

    async def block(self):
        """Keeps the device busy with a request of another client, until "forward" is released."""
        self.engine.hold("forward")
        self.ask([1], [1], [1], [1, 2], client="blocker")  # the first three need not run
        await reached(self.engine, "forward")


def at_a_desk(kind=EngineDouble, **limits):
    """Makes a test of a coroutine function that takes a desk and its engine."""

    def decorate(body):
        def test():
            engine, problems = kind(), []

            async def run():
                loop = asyncio.get_running_loop()
                loop.set_exception_handler(lambda _, context: problems.append(context))
                cache = cache_of_one(engine)
                try:
                    made = Desk(cache, engine, cache.ready("m"), **limits)
                    await asyncio.wait_for(body(made, engine), 20)
                finally:
                    engine.release()

            asyncio.run(run())
            assert problems == []

        test.__name__ = body.__name__
        return test

    return decorate


def same(found, expected):
    np.testing.assert_array_equal(found, expected)
    return True


async def ended(engine, times):
    """Returns once so many passes have ended, and whatever would begin has begun."""
    while engine.count("forward ended") < times:
        await asyncio.sleep(0.005)
    await settle()


FOUR = [[7, 8, 9]] * 4
FOUR_GIVE = [NAN, -7, -8] * 4


@at_a_desk()
async def test_rows_of_many_requests_run_together(made, engine):
    await made.block()
    asked = [made.ask([n, n + 1], client=f"c{n}") for n in range(1, 9)]
    await settle()
    engine.release()
    for n, task in enumerate(asked, 1):
        same(await task, [NAN, -n])
    assert engine.count("forward") == 3


@at_a_desk()
async def test_a_failed_batch_fails_its_requests_and_no_other(made, engine):
    engine.hold("forward")
    engine.failures["forward"] = RuntimeError("the device is hot")
    failing = made.ask(*FOUR * 3)
    await reached(engine, "forward")
    others = made.ask(*FOUR), made.ask(*FOUR * 3, client="b")
    await settle()
    engine.release()
    with pytest.raises(RuntimeError, match="hot"):
        await failing
    same(await others[0], FOUR_GIVE)
    same(await others[1], FOUR_GIVE * 3)
    assert engine.count("forward") == 1 + 1 + 3
    assert made.scheduler.queue.tokens == 0


class Sick(EngineDouble):
    """After token 66 nothing is finite."""

    def forward(self, handle, batch, questions):
        answers = super().forward(handle, batch, questions)
        for question, tensors in zip(questions, answers.tensors, strict=True):
            sick = batch.tokens.reshape(-1)[question.after] == 66
            for values in tensors.values():
                values[sick] = np.inf
        return answers


@at_a_desk(Sick)
async def test_what_is_not_finite_fails_one_request(made, engine):
    await made.block()
    sick = made.ask([1, 2], [66, 5], client="a")
    well = made.ask([3, 4], client="b")
    await settle()
    engine.release()
    with pytest.raises(ServerError, match="outputs of 1 rows are not finite: 1") as caught:
        await sick
    assert (caught.value.reason, caught.value.details) == (Reason.NON_FINITE_OUTPUT, {"rows": "1"})
    same(await well, [NAN, -3])
    assert engine.count("forward") == 2


@at_a_desk()
async def test_what_was_cancelled_never_runs(made, engine):
    await made.block()
    task = made.ask(*FOUR * 50)
    await settle()
    assert made.scheduler.queue.tokens == 200 * 128
    await abandon(task)
    assert made.scheduler.queue.tokens == 0
    engine.release()
    await ended(engine, 1)
    assert (engine.count("forward"), engine.count("forward ended")) == (1, 1)
    assert made.model.in_use == 0


@at_a_desk()
async def test_rows_that_run_end_and_the_rest_does_not_begin(made, engine):
    engine.hold("forward")
    task = made.ask(*FOUR * 50)
    await reached(engine, "forward")
    await abandon(task)
    engine.release()
    await ended(engine, 1)
    assert (engine.count("forward"), engine.count("forward ended")) == (1, 1)


@at_a_desk()
async def test_a_request_that_was_cut_goes_on_where_it_was(made, engine):
    for batch in (1, 2, 3):
        engine.hold("forward")
        task = made.ask(*FOUR * 4, request_id="r", client=f"connection {batch}")
        await reached(engine, "forward", batch)
        await abandon(task)
        engine.release()
        await ended(engine, batch)
        assert engine.count("forward") == batch
    same(await made.ask(*FOUR * 4, request_id="r"), FOUR_GIVE * 4)
    assert engine.count("forward") == 4


@at_a_desk()
async def test_it_comes_back_while_its_rows_run(made, engine):
    engine.hold("forward")
    task = made.ask(*FOUR, request_id="r")
    await reached(engine, "forward")
    await abandon(task)
    again = made.ask(*FOUR, request_id="r")
    await settle()
    engine.release()
    same(await again, FOUR_GIVE)
    assert engine.count("forward") == 1


@at_a_desk()
async def test_an_answer_is_kept(made, engine):
    whole = np.array(await made.ask(*FOUR, request_id="r"), "<f4").tobytes()
    for received in (1, 4, 17, 47, 48):
        rest = await made.ask(*FOUR, request_id="r", received_bytes=received)
        assert rest == whole[received:]
    assert engine.count("forward") == 1
    for received in (49, -1, 2**63 - 1):
        task = made.ask(*FOUR, request_id="r", received_bytes=received)
        assert await refusal(task) is Reason.INVALID_REQUEST


@at_a_desk()
async def test_callers_with_one_id_share(made, engine):
    engine.hold("forward")
    tasks = [made.ask(*FOUR, request_id="r", client=name) for name in "abc"]
    await reached(engine, "forward")
    await abandon(tasks.pop(0))
    engine.release()
    for task in tasks:
        same(await task, FOUR_GIVE)
    assert engine.count("forward") == 1


@at_a_desk()
async def test_another_request_under_the_same_id(made, engine):
    await made.ask(*FOUR, request_id="r")
    for request in (
        made.ask(*FOUR, [1], request_id="r"),
        made.ask(*FOUR, request_id="r", semantics={"temperature": 2.0}),
    ):
        assert await refusal(request) is Reason.INVALID_REQUEST
    assert engine.count("forward") == 1


@scenario
async def test_a_model_that_was_unloaded_meanwhile(cache, engine):
    made = Desk(cache, engine, await load(cache))
    engine.hold("forward")
    task = made.ask(*FOUR * 2, request_id="cut")
    await reached(engine, "forward")
    await abandon(task)
    engine.release()
    await made.ask(*FOUR, request_id="done")
    await cache.unload(made.model.handle)
    assert await refusal(made.ask(*FOUR, request_id="new")) is Reason.MODEL_NOT_LOADED
    assert await refusal(made.ask(*FOUR * 3, request_id="cut too")) is Reason.MODEL_NOT_LOADED
    same(await made.ask(*FOUR, request_id="done"), FOUR_GIVE)  # it needs no model any more
    await load(cache)
    same(await made.ask(*FOUR * 2, request_id="cut"), FOUR_GIVE * 2)  # at the first attempt
    same(await made.ask(*FOUR * 3, request_id="cut too"), FOUR_GIVE * 3)


@at_a_desk()
async def test_a_failure_is_not_kept(made, engine):
    engine.failures["forward"] = RuntimeError("for once")
    with pytest.raises(RuntimeError):
        await made.ask(*FOUR, request_id="1")
    engine.failures.clear()
    same(await made.ask(*FOUR, request_id="1"), FOUR_GIVE)


@at_a_desk(answer_bytes=1)
async def test_a_refused_request_takes_no_memory_for_its_answer(made, engine):
    await made.block()
    with mock.patch.object(np, "full", side_effect=AssertionError("memory was taken")):
        reason = await refusal(made.ask([1] * 100, client="b", outputs={"names": ["logits"]}))
    assert reason is Reason.QUEUE_FULL
    engine.release()


@scenario
async def test_an_unload_waits_for_what_was_taken(cache, engine):
    made = Desk(cache, engine, await load(cache))
    await made.block()
    task = made.ask(*FOUR * 3)
    await settle()
    unload = asyncio.create_task(cache.unload(made.model.handle))
    await settle()
    assert await refusal(made.ask(*FOUR)) is Reason.MODEL_NOT_LOADED
    engine.release()
    same(await task, FOUR_GIVE * 3)
    await unload


@at_a_desk()
async def test_answers_are_forgotten_in_time(made, engine):
    with mock.patch.object(answers, "RETENTION_SECONDS", 0.05), EXPIRING:
        await made.ask(*FOUR, request_id="r")
        await asyncio.sleep(0.2)
    await made.ask(*FOUR, [1, 2], request_id="r")
    assert engine.count("forward") == 3


@at_a_desk()
async def test_who_comes_back_is_not_forgotten(made, engine):
    with mock.patch.object(answers, "RETENTION_SECONDS", 0.3), EXPIRING:
        engine.hold("forward")
        for seconds in (0.0, 0.3, 0.0):
            task = made.ask(*FOUR, request_id="r")
            await asyncio.sleep(0.1 + seconds)  # the first was cut longer ago than that
            await abandon(task)
        engine.release()
        same(await made.ask(*FOUR, request_id="r"), FOUR_GIVE)
    assert engine.count("forward") == 1


class Wide(EngineDouble):
    """Gives vectors where those are wanted."""

    def forward(self, handle, batch, questions):
        answers = super().forward(handle, batch, questions)
        widths = {"hidden": 64, "logits": 320}
        for tensors in answers.tensors:
            for name in widths.keys() & tensors.keys():
                tensors[name] = np.repeat(tensors[name][:, None], widths[name], 1)
        return answers


@at_a_desk(Wide)
async def test_layers_do_not_run_together(made, engine):
    await made.block()
    depths = [{}, {"layer": 1}, {"layer": 1}, {}]
    asked = [made.ask([1, 2], outputs={"names": ["hidden"], **depth}) for depth in depths]
    await settle()
    engine.release()
    for task in asked:
        assert await task == [-1] * 64 + [-2] * 64
    assert engine.count("forward") == 1 + 2


class Telling(EngineDouble):
    """Gives what was asked: the token, the one asked about and the temperature, as one number."""

    def forward(self, handle, batch, questions):
        self.events.append("forward")
        tensors = []
        for asked in questions:
            told = batch.tokens.reshape(-1)[asked.after] * 1e4 + asked.targets
            told = (told + asked.temperatures / 100).astype(np.float32)
            names = asked.profile.tensors(asked.profile.outputs)
            wide = [name for name in names if name.startswith(("top_k", "candidates"))]
            tables = told[:, None] + np.pad(
                asked.candidates, ((0, 0), (0, asked.profile.size - asked.candidates.shape[1]))
            )
            tensors.append(
                {
                    name: (tables if name in wide else told).astype(tensor.dtype)
                    for name, tensor in names.items()
                }
            )
        return Answers(tuple(tensors), 0.0, 0.0)


MIXED = [
    {},
    {"semantics": {"temperature": 2.0}},
    {"semantics": {"temperature": 0.5}, "outputs": {"names": ["entropy", "logprobs"]}},
    {"outputs": {"names": ["candidates"], "candidates": {"ids": [5]}}},
    {"outputs": {"names": ["candidates"], "candidates": {"ids": [7, 9]}}},
    {"from_positions": [1]},
]


@at_a_desk(Telling)
async def test_requests_that_run_together_give_what_they_give_alone(made, engine):
    rows = [[[n + 10, n + 20, n + 30], [n + 40, n + 50]] for n in range(12)]
    asked = [(rows[n], MIXED[n % len(MIXED)]) for n in range(12)]
    alone = [await made.ask(*some, **fields) for some, fields in asked]
    assert engine.count("forward") == 12
    same(alone[1], np.float32([NAN, 11 * 1e4 + 21.02, 21 * 1e4 + 31.02, NAN, 41 * 1e4 + 51.02]))
    together = [
        made.ask(*some, client=f"c{n % 5}", **fields) for n, (some, fields) in enumerate(asked)
    ]
    for found, expected in zip(await asyncio.gather(*together), alone, strict=True):
        same(found, expected)
    assert engine.count("forward") == 12 + 6


# What is refused before it is taken.


@at_a_desk()
async def test_other_weights_than_expected_are_refused(made, engine):
    assert await refusal(made.ask([1, 5], expected_weights_version=2)) is (
        Reason.WEIGHTS_VERSION_MISMATCH
    )
    assert engine.count("forward") == 0
    same(await made.ask([1, 5], expected_weights_version=1), [NAN, -1])


@at_a_desk(queue_tokens=8 * 128)
async def test_a_full_queue_says_when_to_come_again(made, engine):
    await made.block()
    asked = [made.ask([n, 5]) for n in range(4)]
    await settle()
    with pytest.raises(ServerError, match="512 tokens wait, 512 of them this client's") as caught:
        await made.ask([9, 5])
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after == 1.0  # no pass has ended: nothing is known
    assert caught.value.details == {"limit": "1024"}
    asked.append(made.ask(*FOUR, client="b"))
    await settle()
    assert await refusal(made.ask([9, 5], client="c")) is Reason.QUEUE_FULL
    engine.release()
    await asyncio.gather(*asked)
    await made.ask(*FOUR * 50)


@at_a_desk(queue_tokens=8 * 128)
async def test_a_request_larger_than_the_queue_comes_in_beside_others(made, engine):
    await made.block()
    asked = [made.ask(*FOUR)]
    await settle()
    asked.append(made.ask(*FOUR * 50, client="b"))
    await settle()
    assert made.scheduler.queue.tokens == 204 * 128
    assert await refusal(made.ask([9, 5], client="c")) is Reason.QUEUE_FULL
    engine.release()
    await asyncio.gather(*asked)


class Slow(EngineDouble):
    """Takes 50 ms for a batch of any size."""

    def forward(self, handle, batch, questions):
        time.sleep(0.05)
        return super().forward(handle, batch, questions)


@at_a_desk(Slow, queue_tokens=200 * 128)
async def test_when_to_come_again_follows_from_what_was_measured(made, engine):
    await made.ask(*FOUR * 4)
    waiting = made.ask(*FOUR * 100)
    await settle()
    with pytest.raises(ServerError) as caught:
        await made.ask(*FOUR * 40, client="b")
    await abandon(waiting)
    assert 1.5 < caught.value.retry_after < 4  # until 200 rows are left, at four in 50 ms


@at_a_desk(Slow)
async def test_a_deadline_that_cannot_be_met_is_refused(made, engine):
    same(await made.ask(*FOUR, seconds=0.001), FOUR_GIVE)  # nothing is known
    with pytest.raises(ServerError, match=r"would take .* wanted in 0\.2 s") as caught:
        await made.ask(*FOUR * 20, seconds=0.2)
    assert caught.value.reason is Reason.DEADLINE_TOO_SHORT
    assert engine.count("forward") == 1
    same(await made.ask(*FOUR * 2, seconds=5.0), FOUR_GIVE * 2)


@at_a_desk(Slow)
async def test_a_deadline_that_can_be_met_is_not_refused(made, engine):
    """Beside two requests that take long, of the same client and of another."""
    await made.ask(*FOUR)
    long = [made.ask(*FOUR * 100, client=name) for name in "ab"]
    await settle()
    same(await made.ask([5, 6], client="a", seconds=1.0), [NAN, -5])
    same(await made.ask([5, 6], client="c", seconds=1.0), [NAN, -5])
    for task in long:
        await abandon(task)


@at_a_desk(Wide, answer_bytes=100_000)
async def test_answers_that_are_waited_for_are_bounded(made, engine):
    await made.block()
    wide = {"outputs": {"names": ["logits"]}}
    asked = [made.ask([1] * 60, client=name, **wide) for name in "ab"]  # the last one is over it
    await settle()
    task = made.ask([1], client="c", **wide)
    with pytest.raises(ServerError, match="in all they may have 100000") as caught:
        await task
    assert (caught.value.reason, caught.value.retry_after) == (Reason.QUEUE_FULL, 1.0)
    engine.release()
    await asyncio.gather(*asked)
    await made.ask([1], client="c", **wide)


@at_a_desk(Wide, answer_bytes=200_000)
async def test_a_client_whose_answers_take_much_leaves_room_for_others(made, engine):
    await made.block()
    wide = {"outputs": {"names": ["logits"]}}
    asked = [made.ask([1] * 50, client="a", **wide)]
    await settle()
    with pytest.raises(ServerError, match=r"max_waiting_bytes.* left free") as caught:
        await made.ask([1] * 50, client="a", **wide)
    assert caught.value.reason is Reason.QUEUE_FULL
    asked.append(made.ask([1] * 50, client="b", **wide))
    await settle()
    engine.release()
    await asyncio.gather(*asked)
    await made.ask([1] * 50, client="a", **wide)


@at_a_desk()
async def test_signs_of_life(made, engine):
    await made.block()
    seen = []
    with mock.patch.object(scoring_service, "_HEARTBEAT_SECONDS", 0.02):
        task = made.ask(*FOUR * 2, [1, 2], seen=seen)
        while not seen:
            await asyncio.sleep(0.01)
        engine.release()
        await task
    first = seen[0].progress
    assert (first.rows_done, first.rows, first.queued_tokens) == (0, 9, 9 * 128)
    assert [part.WhichOneof("part") for part in seen[-2:]] == ["header", "chunk"]
