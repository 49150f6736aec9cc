"""What goes wrong on the way from a hub, for each hub alike: the reason, the hint, the recovery."""

from __future__ import annotations

import errno
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

from downloads import contents, fetch, seconds_to_cancel
from hubs import FILES, HUBS, SHARD, Service, serving, set_timeouts
from loopback import Fault
from moorage_models.errors import ModelError, Reason
from moorage_models.sources import digests, gcs, kaggle


@pytest.fixture
def service(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Service]:
    with serving(request.param, monkeypatch, tmp_path) as service:
        yield service


EACH_HUB = pytest.mark.parametrize("service", HUBS, indirect=True)

UNAVAILABLE, CORRUPT = Reason.SOURCE_UNAVAILABLE, Reason.CHECKPOINT_CORRUPT


class Case(NamedTuple):
    fault: dict[str, int]
    reason: Reason
    says: str
    stages: str


CASES = {
    "cut": Case({"cut": 100}, UNAVAILABLE, "try later", "listing config content"),
    "stall": Case({"stall": 100}, UNAVAILABLE, "try later", "listing config address content"),
    "429": Case({"status": 429}, UNAVAILABLE, "answers 429: try later", "listing address content"),
    "500": Case({"status": 500}, UNAVAILABLE, "answers 500: try later", "listing address content"),
    "503": Case({"status": 503}, UNAVAILABLE, "answers 503: try later", "listing config content"),
    "wrong length": Case({"length": 9000}, UNAVAILABLE, "try later", "content"),
    "wrong byte": Case({"flip": 9000}, CORRUPT, f"{SHARD} is not what", "content"),
    "last byte": Case({"flip": -1}, CORRUPT, "removed: load again", "content"),
}


@pytest.mark.parametrize(
    ("service", "stage", "case"),
    [
        pytest.param(hub, stage, case, id=f"{hub}-{stage}-{name}")
        for name, case in CASES.items()
        for stage in case.stages.split()
        for hub in HUBS
        if (hub, stage) != ("gcs", "address")  # there objects have none
    ],
    indirect=["service"],
)
def test_a_fault_is_told_and_the_next_attempt_succeeds(
    service: Service, monkeypatch: pytest.MonkeyPatch, stage: str, case: Case
) -> None:
    set_timeouts(monkeypatch, 0.1)
    checkpoint = service.open() if stage in {"address", "content"} else None
    service.hub.faults = [Fault(service.stages[stage], **case.fault)]
    with pytest.raises(ModelError) as caught:
        fetch(checkpoint or service.open())
    assert caught.value.reason is case.reason
    assert case.says in caught.value.message
    assert "secret" not in caught.value.message
    if checkpoint:
        assert SHARD not in service.placed(checkpoint)
        assert service.placed(checkpoint).items() <= FILES.items()
    service.hub.faults = []
    set_timeouts(monkeypatch, 5)
    assert contents(fetch(checkpoint or service.open())) == FILES
    assert service.leftovers() == []


@EACH_HUB
@pytest.mark.parametrize("refusal", ["gated", "revoked"])
@pytest.mark.parametrize("when", ["before it is opened", "before it is fetched"])
def test_who_may_not_read_is_told_how_he_may(
    service: Service, monkeypatch: pytest.MonkeyPatch, refusal: str, when: str
) -> None:
    checkpoint = service.open() if "fetched" in when else None
    with monkeypatch.context() as patch:
        service.refusals[refusal](patch)
        with pytest.raises(ModelError) as caught:
            fetch(checkpoint or service.open())
    assert caught.value.reason is Reason.SOURCE_AUTH_REQUIRED
    assert service.access in caught.value.message
    assert "stale" not in caught.value.message
    assert checkpoint is None or service.placed(checkpoint) == {}
    assert contents(fetch(checkpoint or service.open())) == FILES


class FullDisk(io.FileIO):
    """A file on a disk that becomes full."""

    room = 50_000

    def write(self, data: Any, /) -> int:
        FullDisk.room -= len(data)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@EACH_HUB
def test_a_disk_that_becomes_full_is_told(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = {"r+b": io.BufferedRandom, "ab": io.BufferedWriter, "wb": io.BufferedWriter}

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode in buffers:
            return buffers[mode](FullDisk(path, mode.replace("b", "")))
        return open(path, mode, *args, **kwargs)

    checkpoint = service.open()
    with monkeypatch.context() as patch:
        for module in (kaggle, gcs):
            patch.setattr(module, "open", opened, raising=False)
        patch.setattr(Path, "open", opened)
        patch.setattr(FullDisk, "room", 50_000)
        with pytest.raises(ModelError) as caught:
            fetch(checkpoint)
    assert caught.value.reason is Reason.DISK_FULL
    assert "is full: free some, or set" in caught.value.message
    assert service.placed(checkpoint).items() <= FILES.items()
    assert contents(fetch(checkpoint)) == FILES
    assert service.leftovers() == []


@EACH_HUB
def test_a_slow_hub_is_waited_for(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = service.open()
    set_timeouts(monkeypatch, 0.3)
    service.hub.pause = 0.05  # with twelve pieces a file: twice the timeout
    service.hub.log.clear()
    assert contents(fetch(checkpoint)) == FILES
    requests = [(r.line, r.range) for r in service.hub.log]
    assert len(requests) == len(set(requests))  # no one is given up and made again


# A cancel ends the call within a second, wherever it is


@pytest.mark.parametrize(
    ("service", "stage"),
    [(hub, stage) for hub in HUBS for stage in ("address", "content") if hub != "gcs"]
    + [("gcs", "content")],
    indirect=["service"],
)
def test_a_cancel_ends_what_stalls(service: Service, stage: str) -> None:
    checkpoint = service.open()
    service.hub.faults = [Fault(service.stages[stage], stall=5000)]
    assert 0.3 <= seconds_to_cancel(checkpoint) < 1.3
    service.hub.faults = []
    if service.request.source != "huggingface":  # its client keeps the file until its timeout
        start = time.monotonic()
        assert contents(fetch(checkpoint)) == FILES
        assert time.monotonic() - start < 2


@EACH_HUB
def test_a_cancel_ends_the_wait_for_another_process(service: Service) -> None:
    checkpoint = service.open()
    path = checkpoint.repository.records.home / "moorage" / "lock"
    path.parent.mkdir(parents=True)
    with FileLock(path):
        assert 0.3 <= seconds_to_cancel(checkpoint) < 1.3
    assert contents(fetch(checkpoint)) == FILES


@EACH_HUB
def test_a_cancel_ends_verification(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    class Slow:
        def update(self, data: bytes, /) -> None:
            over.wait(10)

        def hexdigest(self) -> str:
            return ""

    checkpoint = service.open()
    with monkeypatch.context() as patch:
        for algorithm in digests.ALGORITHMS:
            patch.setitem(digests.ALGORITHMS, algorithm, Slow)
        assert 0.3 <= seconds_to_cancel(checkpoint) < 1.3
    over.set()
