"""What the server has done since it started, for ServerService, metrics and the status page."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from moorage_models.monitor import Stage
from moorage_server.calls import Call
from moorage_server.histograms import Histograms
from moorage_server.lifecycle import State

#: How many errors are remembered.
RECENT = 50

_BYTE_STAGES = ("fetch", "place")


@dataclass(frozen=True)
class Refusal:
    """A request that was refused or failed.

    Attributes:
        time: When, in seconds since the epoch.
        call: The request.
        reason: Why, from the wire's list.
        message: What its caller was told.
    """

    time: float
    call: Call
    reason: str
    message: str


@dataclass
class Activity:
    """Counts, which only rise, and how long things took.

    Attributes:
        forwards: Forward passes answered.
        tokens: Tokens of theirs.
        batches: Batches that ran.
        batch_tokens: Tokens in them, of rows that were asked for.
        batch_slots: Tokens in them, padding included.
        loads: Loads that are over, by the state that they ended in, or the reason of a failure.
        refusals: Requests that were refused or failed, by reason.
        errors: The latest of those.
        histograms: How long calls, forward passes and loads took.
    """

    forwards: int = 0
    tokens: int = 0
    batches: int = 0
    batch_tokens: int = 0
    batch_slots: int = 0
    loads: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    errors: deque[Refusal] = field(default_factory=lambda: deque(maxlen=RECENT))
    histograms: Histograms = field(default_factory=Histograms)

    def refuse(self, call: Call, reason: str, message: str) -> None:
        """Takes note of a request that was refused or failed."""
        self.refusals[reason] += 1
        self.errors.append(Refusal(time.time(), call, reason, message))

    def end_call(self, call: Call, code: str, seconds: float) -> None:
        """Takes note of a call that is over, by the name of the code that its caller got."""
        self.histograms.observe("moorage_call_seconds", seconds, call.method, code)

    def end_load(self, stages: Mapping[str, Stage], seconds: float) -> None:
        """Takes note of a load that went well, by its stages and as a whole."""
        self.loads[State.READY] += 1
        self.histograms.observe("moorage_load_seconds", seconds, "whole")
        for name, stage in stages.items():
            self.histograms.observe("moorage_load_seconds", stage.seconds, name)
            if name in _BYTE_STAGES:
                self.histograms.observe("moorage_load_bytes", stage.done, name)

    def answer(self, tokens: int, stages: Mapping[str, float]) -> None:
        """Takes note of a forward pass that was answered, and of the seconds in each stage."""
        self.forwards += 1
        self.tokens += tokens
        for name, seconds in stages.items():
            self.histograms.observe("moorage_forward_seconds", seconds, name)

    def run_batch(self, tokens: int, slots: int) -> None:
        """Takes note of a batch that ran."""
        self.batches += 1
        self.batch_tokens += tokens
        self.batch_slots += slots
