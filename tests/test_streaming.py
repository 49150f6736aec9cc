"""Weights that go from a hub to the devices: the bits of a folder, and nothing on the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoints import mesh_of, open_folder
from downloads import fetch
from hubs import FILES, HUBS, SHARD, Service, serving
from loopback import Fault
from moorage_models import bands, streaming
from moorage_models.arena import Arena
from moorage_models.automodel import load
from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_models.placement import ArenaPlacer, Placer
from moorage_models.ring import RingPlacer

PLACERS = [ArenaPlacer(Arena()), RingPlacer()]
WEIGHTS = [name for name in FILES if name.endswith(".safetensors")]


@pytest.fixture
def service(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Service]:
    with serving(request.param, monkeypatch, tmp_path) as service:
        yield service


EACH_HUB = pytest.mark.parametrize("service", HUBS, indirect=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("folder")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    params, _ = load(open_folder(folder), mesh_of(1, 1))
    return {name: np.asarray(value) for name, value in params.items()}


def check(checkpoint: Checkpoint, expected: dict[str, np.ndarray], placer: Placer) -> str:
    params, path = load(checkpoint, mesh_of(2, 2), placer=placer, stream=True)
    assert params.keys() == expected.keys()
    for name, value in params.items():
        assert np.asarray(value).tobytes() == expected[name].tobytes(), name
    return path


@EACH_HUB
@pytest.mark.parametrize("placer", PLACERS, ids=["arena", "ring"])
def test_the_bits_are_those_of_a_folder(
    service: Service, placer: Placer, expected: dict[str, np.ndarray]
) -> None:
    checkpoint = service.open()
    opened = {name: service.hub.sent(f"*{name}") for name in WEIGHTS}
    assert check(checkpoint, expected, placer) == checkpoint.repository.label
    assert not list(service.cache.rglob("*.safetensors*"))
    # Every byte once, but for the embedding, with which the head that is stored too is compared.
    sent, header = service.hub.sent("*.safetensors"), sum(opened.values())
    assert 0 < header < sent <= sum(len(FILES[n]) for n in WEIGHTS) + expected["embed"].nbytes


@EACH_HUB
def test_a_long_run_is_asked_for_in_parts(
    service: Service, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bands, "READ_BYTES", 5000)
    monkeypatch.setattr(streaming, "READ_BYTES", 3000)
    check(service.open(), expected, PLACERS[0])


@EACH_HUB
@pytest.mark.parametrize(
    "fault",
    [Fault(f"GET *{SHARD}", cut=100, times=2), Fault(f"GET *{SHARD}", status=503, times=2)],
    ids=["cut", "503"],
)
def test_what_breaks_is_asked_for_again(
    service: Service, fault: Fault, expected: dict[str, np.ndarray]
) -> None:
    checkpoint = service.open()
    service.hub.faults = [replace(fault)]
    check(checkpoint, expected, PLACERS[0])


@EACH_HUB
def test_a_hub_that_is_gone_is_told(service: Service) -> None:
    checkpoint = service.open()
    service.hub.faults = [Fault(f"GET *{SHARD}", status=500)]
    with pytest.raises(ModelError, match="try later") as caught:
        load(checkpoint, mesh_of(1, 1), stream=True)
    assert caught.value.reason is Reason.SOURCE_UNAVAILABLE


@EACH_HUB
def test_a_stalled_load_is_cancelled_within_a_second(service: Service) -> None:
    checkpoint, monitor = service.open(), LoadMonitor()
    service.hub.faults = [Fault(f"GET *{SHARD}", stall=10)]
    threading.Timer(0.3, monitor.cancel).start()
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load(checkpoint, mesh_of(1, 1), monitor, stream=True)
    assert caught.value.reason is Reason.LOAD_CANCELLED
    assert time.monotonic() - start < 1.3


@pytest.mark.parametrize("service", ["gcs"], indirect=True)
def test_an_object_that_was_replaced_is_refused(service: Service) -> None:
    checkpoint = service.open()
    service.hub.put("bucket", {f"tiny/{SHARD}": FILES[SHARD][::-1]})  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="was changed while it was read: load again") as caught:
        load(checkpoint, mesh_of(1, 1), stream=True)
    assert caught.value.reason is Reason.CHECKPOINT_CORRUPT


@pytest.mark.parametrize("service", ["huggingface"], indirect=True)
def test_what_is_held_already_is_read_from_the_disk(
    service: Service, expected: dict[str, np.ndarray]
) -> None:
    fetch(service.open())
    asked = len(service.hub.lines("GET /cdn/*"))
    checkpoint = service.open()
    assert check(checkpoint, expected, PLACERS[0]) == str(checkpoint.repository.destination)
    assert len(service.hub.lines("GET /cdn/*")) == asked


@pytest.mark.parametrize("service", ["huggingface"], indirect=True)
def test_a_download_path_keeps_a_copy(
    service: Service, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    request = replace(service.request, download_path=str(tmp_path / "kept"))
    check(open_checkpoint(request), expected, PLACERS[0])
    assert (tmp_path / "kept" / SHARD).read_bytes() == FILES[SHARD]
