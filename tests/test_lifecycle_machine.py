"""Calls in any order, faults at any point: what must hold of models, memory and leases throughout.

Nothing here goes on by itself. A thread stops at every point that the engine names, and the event
loop turns as often as a rule says: a sequence that fails once fails again.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import shutil
import tempfile
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cache_scenario import CALL, CONTEXT, wanted
from moorage.v1 import moorage_pb2 as pb
from moorage_models.errors import ModelError
from moorage_models.errors import Reason as ModelReason
from moorage_models.sources import Policy
from moorage_server import convert, device_thread, loader
from moorage_server import looks as looks_module
from moorage_server.cache import ModelCache
from moorage_server.calls import CURRENT
from moorage_server.draining import Draining
from moorage_server.engine import agreement
from moorage_server.errors import ServerError
from moorage_server.journal import Journal
from moorage_server.model_service import ModelService
from moorage_server.scheduler import Scheduler
from moorage_server.scoring_service import ScoringService
from stepping import CAPACITY, HANDLES, NEED_OF, NEEDS, POINTS, Job, Pool, SteppedEngine, total

FOLLOWING = {
    "": {"QUEUED"},
    "QUEUED": {"QUEUED", "LOADING", "FAILED", "CANCELLED"},  # itself: its leases changed
    "LOADING": {"LOADING", "READY", "FAILED", "CANCELLED"},
    "READY": {"READY", "DRAINING"},
    "DRAINING": {"DRAINING", "UNLOADED"},
}
OVER = {"UNLOADED", "FAILED", "CANCELLED"}
HOLDING = {"LOADING", "READY", "DRAINING"}


@dataclass
class Call:
    """A call under way.

    Attributes:
        task: Its task.
        handle: The model that it is about.
        cancelled: How many unloads of that model there had been when it began.
        loads: It is a LoadModel.
        left: Its caller has left.
    """

    task: asyncio.Task[None]
    handle: str
    cancelled: int
    loads: bool = False
    left: bool = False


@dataclass
class Held:
    """A lease as its holder knows it."""

    handle: str
    seconds: float
    expires: float


TURNS = st.sampled_from([0, 1, 1, 2, 3, 4, 6, 60])
NAMES = st.sampled_from([*NEEDS, *list(NEEDS)[:-1]])
PICK = st.integers(0, 7)


class Lifecycle(RuleBasedStateMachine):
    """Callers around a cache whose threads and event loop the test runs.

    Attributes:
        steps: How many rules were run in all.
    """

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0.0
        self.folder = tempfile.TemporaryDirectory()
        self.journal = Journal(Path(self.folder.name) / "0")
        self.leases: dict[str, Held] = {}
        self.given: list[str] = []
        self.injected: list[Exception] = []
        self.patch = mock.patch.object(looks_module, "open_checkpoint", self._look)
        self.patch.start()
        self._start()

    def _start(self) -> None:
        """Starts a server: all that ends with its process."""
        self.problems: list[dict[str, Any]] = []
        problems = self.problems
        self.loop = asyncio.new_event_loop()
        self.loop.time = lambda: self.clock  # type: ignore[method-assign]
        self.loop.set_exception_handler(lambda _, context: problems.append(context))
        self.engine = SteppedEngine(self._in_use)
        self.pools: list[Pool] = []
        with (
            mock.patch.object(looks_module, "ThreadPoolExecutor", self._pool),
            mock.patch.object(loader, "ThreadPoolExecutor", self._pool),
            mock.patch.object(device_thread, "ThreadPoolExecutor", self._pool),
        ):
            self.cache = ModelCache(self.engine, Policy(), lambda: self.clock, self.journal)
        self.scheduler = Scheduler(self.engine, self.cache.device_thread)
        self.calls: list[Call] = []
        self.unloads: Counter[str] = Counter()
        self.firm: set[str] = set()
        self.firm_and_left: set[str] = set()  # what they asked for may come after an unload
        self.asked: set[str] = set()
        self.awaited: set[str] = set()
        self.sequence = 0
        self.states = dict.fromkeys(NEED_OF, "")
        self.before: tuple[list[str], set[str]] = ([], set())

    # What callers do.

    @rule(name=NAMES, lease=st.sampled_from([0, 0, 10, 100]), firm=st.booleans(), turns=TURNS)
    def load(self, name: str, lease: int, firm: bool, turns: int) -> None:
        message = pb.LoadModelRequest(
            model=convert.to_spec(wanted(name)), cancel_if_abandoned=not firm
        )
        if lease:
            message.lease.duration.FromSeconds(lease)
        if firm:
            self.firm.add(HANDLES[name])
        self._begin(self._load(message), HANDLES[name], loads=True)
        self.turn(turns)

    async def _load(self, message: pb.LoadModelRequest) -> None:
        async for answer in ModelService(self.cache, Draining()).LoadModel(message, CONTEXT):
            if answer.HasField("model"):
                handle, seconds = answer.model.handle, message.lease.duration.seconds
                model = self.cache.get(handle)
                assert (model.state, model.unload) == ("READY", None), "given what is going"
                if seconds:
                    self.leases[answer.lease.id] = Held(handle, seconds, self.clock + seconds)
                    self.given.append(answer.lease.id)

    @rule(name=NAMES, turns=TURNS)
    def forward(self, name: str, turns: int) -> None:
        self._begin(self._forward(HANDLES[name]), HANDLES[name])
        self.turn(turns)

    async def _forward(self, handle: str) -> None:
        ready, awaited = self._is_ready(handle), handle in self.awaited
        message = pb.ForwardRequest(handle=handle, token_ids=[7, 8, 9], row_lengths=[3])
        service = ScoringService(self.cache, self.engine, self.scheduler, Draining())
        answers = service.Forward(message, CONTEXT)
        found: object = None
        try:
            parts = [part.WhichOneof("part") async for part in answers]
            found = [part for part in parts if part != "progress"]  # if time passed meanwhile
        except ServerError as error:
            found = error.reason
        if awaited:  # then it has waited
            ready = found != "MODEL_NOT_LOADED" or self._is_ready(handle)
        assert found == (["header", "chunk"] if ready else "MODEL_NOT_LOADED")

    @precondition(lambda self: self.calls)
    @rule(pick=PICK, turns=TURNS)
    def leave(self, pick: int, turns: int) -> None:
        call = self.calls[pick % len(self.calls)]
        call.left = True
        if call.loads and call.handle in self.firm:
            self.firm_and_left.add(call.handle)
        call.task.cancel()
        self.turn(turns)

    @rule(name=NAMES, pick=PICK, how=st.sampled_from(["plain", "own", "force"]), turns=TURNS)
    def unload(self, name: str, pick: int, how: str, turns: int) -> None:
        own = self.given[pick % len(self.given)] if how == "own" and self.given else ""
        self._begin(self._unload(HANDLES[name], own, how == "force"), HANDLES[name])
        self.turn(turns)

    async def _unload(self, handle: str, own: str, force: bool) -> None:
        others = [i for i in self._leases_of(handle) if i != own]
        refused = "MODEL_LEASED" if others and not force else ""
        if self._model(handle) is None:
            refused = "MODEL_NOT_LOADED"
        if not refused:
            self.asked.add(handle)
            self.unloads[handle] += 1
        message = pb.UnloadModelRequest(handle=handle, lease_id=own, force=force)
        reason = ""
        try:
            await ModelService(self.cache, Draining()).UnloadModel(message, CONTEXT)
        except ServerError as error:
            reason = str(error.reason)
        assert reason == refused

    @precondition(lambda self: self.given)
    @rule(pick=PICK, release=st.booleans())
    def renew_or_release(self, pick: int, release: bool) -> None:
        lease = self.given[pick % len(self.given)]
        alive = any(lease in self._leases_of(handle) for handle in NEED_OF)
        reason = ""
        try:
            if release:
                self.cache.release(lease)
            else:
                self.cache.renew(lease)
        except ServerError as error:
            reason = str(error.reason)
        assert reason == ("" if alive else "LEASE_UNKNOWN")
        if not alive:
            return
        if release:
            del self.leases[lease]
        else:
            self.leases[lease].expires = self.clock + self.leases[lease].seconds

    # What happens to them.

    @rule(seconds=st.sampled_from([0.25, 5.0, 11.0, 100.0]), turns=TURNS)
    def time_passes(self, seconds: float, turns: int) -> None:
        self.clock += seconds
        self.turn(turns)

    @rule(point=st.sampled_from(POINTS), known=st.booleans())
    def something_will_fail(self, point: str, known: bool) -> None:
        told = ModelError(ModelReason.CHECKPOINT_CORRUPT, "damaged")
        self.injected.append(told if known else RuntimeError("a bug"))
        self.engine.failures[point] = self.injected[-1]

    @precondition(lambda self: any(m.state in HOLDING for m in self.cache.models()))
    @rule(
        down=st.sampled_from([0.0, 5.0, 1000.0]),
        fault=st.sampled_from([None, None, *POINTS]),
        turns=TURNS,
    )
    def restart(self, down: float, fault: str | None, turns: int) -> None:
        """Kills the server wherever it is; the next one goes on from the journal."""
        entries, leases = self._kept()
        generation = int(self.journal.path.name) + 1
        journal = Journal(self.journal.path.with_name(str(generation)))
        shutil.copy(self.journal.path, journal.path)  # the old one goes on writing while it ends
        self._stop()
        self.clock += down
        self.journal = journal
        self._start()
        self.awaited, self.firm = set(entries), set(entries)
        self.leases = {
            lease.id: Held(lease.handle, lease.seconds, self.clock + lease.expires)
            for lease in leases
        }
        if fault:
            self.something_will_fail(fault, True)
        self.loop.call_soon(self.cache.restore)
        self.turn(max(turns, 1))

    def _kept(self) -> tuple[list[str], list[Any]]:
        """What the journal says, which must be what there is."""
        entries, leases = self.journal.read(now=0.0)
        handles, kept = [entry.handle for entry in entries], {lease.id: lease for lease in leases}
        ready = {m.handle for m in self.cache.models() if m.state == "READY"}
        assert len(handles) == len(set(handles))
        assert ready | (self.awaited - self.engine.faulty) <= set(handles)
        assert set(handles) <= ready | self.awaited | self.engine.faulty
        for name, held in self.leases.items():
            if held.expires > self.clock and held.handle in handles:  # else it is unloaded
                left = kept[name].expires  # its clock may have stopped when this was written
                assert held.expires - self.clock <= left <= held.seconds
                assert kept[name].handle == held.handle
        assert kept.keys() <= self.leases.keys()
        return handles, leases

    @precondition(lambda self: self._jobs())
    @rule(pick=PICK, steps=st.integers(1, 6), turns=TURNS)
    def work(self, pick: int, steps: int, turns: int) -> None:
        jobs = self._jobs()
        job = jobs[pick % len(jobs)]
        for _ in range(steps):
            if not job.future.done():
                job.step()
        self.turn(turns)

    @rule()
    def work_to_the_end(self) -> None:
        self.turn(60)
        for _ in range(100):
            if not (jobs := self._jobs()):
                return
            for job in jobs:
                job.step()
            self.turn(60)
        raise AssertionError("it never ends")

    @rule(turns=TURNS)
    def turn(self, turns: int) -> None:
        async def run() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        if turns:
            self.loop.run_until_complete(run())
            self._read_log()
            self._forget_what_cannot_come()
            self._end_calls()
        if turns == 60:
            self._nobody_works_for_nobody()

    # What must hold.

    @invariant()
    def count(self) -> None:
        Lifecycle.steps += 1

    @invariant()
    def memory_is_promised_to_those_who_hold_it(self) -> None:
        holding = {m.handle for m in self.cache.models() if m.state in HOLDING}
        assert {h for h in NEED_OF if self.cache.budget.promised(h)} == holding
        assert self.cache.budget.reserved() == total(holding) <= CAPACITY
        assert self.engine.placed <= holding
        assert self.engine.wrong == []
        assert self.problems == []

    @invariant()
    def the_log_ends_with_what_is(self) -> None:
        self._read_log()
        there = {model.handle: str(model.state) for model in self.cache.models()}
        last = {h: s for h, s in self.states.items() if s and s not in OVER}
        assert there == last
        for model in self.cache.models():
            leased = {lease.id for lease in self.cache.leases.of(model.handle)}
            assert leased == set(self._leases_of(model.handle))

    @invariant()
    def leases_are_on_what_is_there_or_comes_again(self) -> None:
        there = {model.handle for model in self.cache.models()} | self.awaited
        assert {lease.handle for lease in self.cache.leases.all()} <= there
        assert self.cache.is_restoring or not self.awaited

    @invariant()
    def no_more_is_evicted_than_must(self) -> None:
        models = {model.handle: model for model in self.cache.models()}
        queued = [h for h, model in models.items() if model.state == "QUEUED"]
        leaving = {h for h, model in models.items() if model.unload}
        before, (self.before, same) = self.before, ((queued, leaving), self.before[0] == queued)
        gone = leaving - before[1] - self.asked
        evicted = {h for h in gone if models[h].state in ("READY", "DRAINING")}
        if not (evicted and same and len(queued) == 1 and before[1] <= leaving):
            return
        staying = {h for h, m in models.items() if m.state in HOLDING} - leaving
        for handle in evicted:
            assert total({*staying, handle, *queued}) > CAPACITY, "it need not have gone"
        if len(evicted) == 1:
            (model,) = (models[handle] for handle in evicted)
            for other in staying:
                if models[other].is_idle and not self._leases_of(other):
                    older = models[other].last_wanted < model.last_wanted
                    alone = total({*staying, model.handle, *queued} - {other})
                    assert not older or alone > CAPACITY, "an older one would have done"

    def teardown(self) -> None:
        try:
            self._let_all_go()
            self._load_all_anew()
        finally:
            self._stop()
            self.patch.stop()
            self.folder.cleanup()

    def _let_all_go(self) -> None:
        self.engine.failures.clear()
        self.work_to_the_end()
        self.clock += 2.0
        self.work_to_the_end()
        assert self.calls == []
        assert asyncio.all_tasks(self.loop) == set()
        for model in self.cache.models():
            assert (model.state, model.unload) == ("READY", None)
            assert (model.waiters, model.in_use) == (0, 0)
        assert self.engine.loaded == self.engine.placed == {m.handle for m in self.cache.models()}
        assert self.cache.budget.reserved() == total(self.engine.loaded)

    def _load_all_anew(self) -> None:
        """Once every lease has ended, whatever fits alone can be loaded, and all can be freed."""
        self.clock += 1000.0
        for name in list(NEEDS)[:-1]:
            self.load(name, 0, True, 60)
            self.work_to_the_end()
            assert HANDLES[name] in self.engine.loaded
        for name in NEEDS:
            self.unload(name, 0, "plain", 60)
            self.work_to_the_end()
        self.the_log_ends_with_what_is()
        assert (self.cache.models(), self.cache.budget.reserved()) == ([], 0)
        assert (self.engine.loaded, self.engine.wrong, self.problems) == (set(), [], [])

    def _stop(self) -> None:
        """Ends what still runs, wherever it is; what comes of that is nobody's concern."""
        for _ in range(200):
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            for job in self._jobs():
                job.step()
            self.loop.run_until_complete(asyncio.sleep(0))
            if not (asyncio.all_tasks(self.loop) or self._jobs()):
                break
        self.loop.close()

    # How it is found out.

    def _begin(self, calling: Coroutine[Any, Any, None], handle: str, loads: bool = False) -> None:
        context = contextvars.copy_context()
        context.run(CURRENT.set, CALL)
        task = self.loop.create_task(calling, context=context)
        self.calls.append(Call(task, handle, self.unloads[handle], loads))

    def _pool(self, workers: int, name: str) -> Pool:
        self.pools.append(Pool(workers, name))
        return self.pools[-1]

    def _jobs(self) -> list[Job]:
        return [job for pool in self.pools for job in pool.running()]

    def _look(self, *arguments: Any, **options: Any) -> Any:
        return self.engine.look(*arguments, **options)

    def _is_ready(self, handle: str) -> bool:
        model = self._model(handle)
        return model is not None and model.state == "READY" and not model.unload

    def _model(self, handle: str) -> Any:
        return next((m for m in self.cache.models() if m.handle == handle), None)

    def _in_use(self, handle: str) -> int:
        model = self._model(handle)
        return model.in_use if model else 0

    def _leases_of(self, handle: str) -> list[str]:
        alive = {i: held for i, held in self.leases.items() if held.expires > self.clock}
        return [i for i, held in alive.items() if held.handle == handle]

    def _read_log(self) -> None:
        for change in list(self.cache.changes._latest):
            if change.sequence <= self.sequence:
                continue
            assert change.sequence == self.sequence + 1
            self.sequence = change.sequence
            self._follow(change.value)

    def _follow(self, snapshot: Any) -> None:
        handle, state = snapshot.model.handle, str(snapshot.model.state)
        before = self.states[handle]
        assert state in FOLLOWING["" if before in OVER else before]
        self.states[handle] = state
        if state == "DRAINING" and handle not in self.asked:
            assert (snapshot.leases, snapshot.model.in_use, snapshot.model.waiters) == ((), 0, 0)
        if handle in self.awaited and state in (OVER | {"READY"}):
            assert state == "READY" or handle in self.engine.faulty | self.asked, "not restored"
            self.awaited.discard(handle)
        if state in OVER:
            self.asked.discard(handle)
            self.firm -= {handle} - {c.handle for c in self.calls if c.loads} - self.firm_and_left
            self._lose_leases(handle)

    def _lose_leases(self, handle: str) -> None:
        self.leases = {i: held for i, held in self.leases.items() if held.handle != handle}

    def _forget_what_cannot_come(self) -> None:
        """A model whose source cannot be asked any more has no state that the log could tell."""
        for handle in self.awaited - self.cache._restoration._waiting.keys():
            assert handle in self.engine.faulty, "not restored"
            self.awaited.discard(handle)
            self._lose_leases(handle)

    def _end_calls(self) -> None:
        ended = [call for call in self.calls if call.task.done()]
        self.calls = [call for call in self.calls if not call.task.done()]
        for call in ended:
            if call.task.cancelled():
                assert call.left
            elif error := call.task.exception():
                self._explain(call, error)

    def _explain(self, call: Call, error: BaseException) -> None:
        """Fails unless a call has failed for a reason that there was."""
        if any(error is one for one in self.injected):
            return
        if not isinstance(error, ModelError | ServerError):
            raise error
        assert call.loads
        if error.reason == "LOAD_CANCELLED":
            assert self.unloads[call.handle] > call.cancelled, "nobody had asked for that"
            return
        assert error.reason == "DEVICE_BUDGET_EXCEEDED"
        need, details = NEED_OF[call.handle], {n: int(v) for n, v in error.details.items()}
        assert set(details) == {"needed_bytes", "free_bytes", "leased_bytes"}
        assert details["needed_bytes"] == need.weights + need.temporaries
        assert 0 <= details["free_bytes"] < details["needed_bytes"]
        assert 0 <= details["leased_bytes"] <= CAPACITY - details["free_bytes"]

    def _nobody_works_for_nobody(self) -> None:
        """A load that everybody has left, who all asked for its end then, ends."""
        wanted = {call.handle for call in self.calls if call.loads} | self.firm
        for model in self.cache.models():
            if model.state in ("QUEUED", "LOADING") and model.handle not in wanted:
                assert model.unload, "nobody wants it"


QUICK = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def run_with(some: settings) -> None:
    """As in float32, in which fewer rows are tried."""
    with mock.patch.object(agreement, "HALF_PRECISION_TOKENS", 0):
        run_state_machine_as_test(Lifecycle, settings=some)
    gc.collect()


def test_whatever_happens_in_whatever_order() -> None:
    run_with(QUICK)


@pytest.mark.soak
def test_whatever_happens_in_whatever_order_for_long() -> None:
    long = settings(
        QUICK, max_examples=400, stateful_step_count=60, derandomize=False, print_blob=True
    )
    run_with(long)
    print(f"{Lifecycle.steps} steps")
    assert Lifecycle.steps > 10_000
