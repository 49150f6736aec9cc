"""Many processes that load one checkpoint from a hub, and processes that die while they do."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from downloads import contents, fetch
from hubs import FILES, FILES_BYTES, HUBS, Service, digests, serving

DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
POINTS = 10


@pytest.fixture(params=HUBS)
def service(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Service]:
    with serving(request.param, monkeypatch, tmp_path) as service:
        yield service


@pytest.mark.parametrize("count", [4, pytest.param(30, marks=pytest.mark.soak)])
def test_processes_at_once_bring_a_checkpoint_once(service: Service, count: int) -> None:
    with service.start(count) as processes:
        service.hub.log.clear()
        output, _ = processes.communicate(timeout=60)
    assert digests(output) == [DIGESTS] * count
    assert service.hub.sent() == FILES_BYTES
    assert max(Counter((r.line, r.range) for r in service.hub.log).values()) == 1
    assert service.leftovers() == []


@pytest.mark.parametrize(
    "point", [p if p == 5 else pytest.param(p, marks=pytest.mark.soak) for p in range(POINTS)]
)
def test_a_process_that_is_killed_leaves_nothing_that_misleads_the_next(
    service: Service, point: int
) -> None:
    checkpoint = service.open()
    hub = service.hub
    with service.start() as process:
        hub.most = (FILES_BYTES - 1) * point // (POINTS - 1)
        assert process.stdin
        process.stdin.close()
        assert hub.spent.wait(30)
        process.kill()
    assert process.returncode == -9
    assert service.placed(checkpoint).items() <= FILES.items()
    assert point == 0 or service.leftovers() or service.placed(checkpoint)
    hub.most = 1 << 60
    hub.log.clear()
    assert contents(fetch(checkpoint)) == FILES
    assert hub.sent() <= FILES_BYTES
    assert service.leftovers() == []
