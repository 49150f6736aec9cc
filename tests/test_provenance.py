"""The digest of a model's weights: what it is made of, when it changes, and `--verify`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import huggingface_hub
import kagglehub
import pytest
from huggingface_hub import constants

from checkpoints import mesh_of
from downloads import fetch
from engine_double import EngineDouble
from hubs import FILES, HUBS, SHARD, Service, serving
from loopback import Fault
from moorage_models import automodel
from moorage_models.automodel import load
from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor, Stage
from moorage_models.provenance import claims_of, combine
from moorage_models.sources import ModelRequest, ModelSource, Policy, open_repository
from moorage_server import main

WEIGHTS = sorted(name for name in FILES if name.endswith(".safetensors"))
VERIFY = Policy(verify=True)


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def md5(content: bytes) -> str:
    return f"md5:{hashlib.md5(content).hexdigest()}"


def crc32c(content: bytes) -> str:
    return f"crc32c:{google_crc32c.value(content):08x}"


#: The digests that each hub states of weights.
STATED = {"huggingface": sha256, "kaggle": md5, "gcs": crc32c}


def manifest(kind: str, known: Callable[[str], str]) -> str:
    """The digest of FILES, of each of whose weights something is known."""
    lines = [f"config.json\0{len(FILES['config.json'])}\0{sha256(FILES['config.json'])}\n"]
    lines += [f"{name}\0{len(FILES[name])}\0{known(name)}\n" for name in WEIGHTS]
    return f"{kind}:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


CONTENT = manifest("content", lambda name: sha256(FILES[name]))


def damage(path: Path) -> None:
    """Changes a byte of a tensor, and neither the size nor the time of change."""
    path = path.resolve()
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 0xFF]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def refusal(checkpoint: Checkpoint, monitor: LoadMonitor | None = None) -> ModelError:
    """The error with which a load ends, which tells of no place on this machine."""
    with pytest.raises(ModelError) as caught:
        load(checkpoint, mesh_of(1, 1), monitor)
    assert str(checkpoint.repository.destination) not in caught.value.message
    return caught.value


def test_a_digest_is_that_of_a_list_of_lines() -> None:
    """The expectation is `printf 'a\\0003\\000sha256:00\\nb\\0001\\000md5:11\\n' | sha256sum`."""
    claims = {"b": "hub:md5:11", "a": "content:sha256:00"}
    digest = "a5edcf00c5c9bb3e71938e038661dbac94a05d2208f05459304df28fe872fda8"
    assert combine({"a": 3, "b": 1, "c": 9}, claims) == f"hub:{digest}"
    assert combine({"a": 3}, {}) == ""


@pytest.mark.parametrize(
    ("kinds", "weakest"),
    [
        ("content content", "content"),
        ("hub content", "hub"),
        ("hub revision content", "revision"),
        ("revision stat hub", "stat"),
    ],
)
def test_a_digest_is_called_by_the_least_that_is_known_of_a_file(kinds: str, weakest: str) -> None:
    claims = {str(i): f"{kind}:x" for i, kind in enumerate(kinds.split())}
    assert combine(dict.fromkeys(claims, 1), claims).startswith(f"{weakest}:")


# Hubs


@pytest.fixture
def service(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Service]:
    with serving(request.param, monkeypatch, tmp_path) as service:
        yield service


EACH_HUB = pytest.mark.parametrize("service", HUBS, indirect=True)
HUGGINGFACE = pytest.mark.parametrize("service", ["huggingface"], indirect=True)
KAGGLE = pytest.mark.parametrize("service", ["kaggle"], indirect=True)


def damaged_copy(service: Service) -> Path:
    """Fetches the checkpoint, and damages a file of it, which does not show."""
    path = fetch(service.open()) / SHARD
    damage(path)
    fetch(service.open())
    return path


@EACH_HUB
def test_a_hub_is_told_by_the_digests_that_it_states(service: Service) -> None:
    stated = STATED[service.request.source.value]
    expected = manifest("hub", lambda name: stated(FILES[name]))
    checkpoint = service.open()
    assert checkpoint.weights_digest == expected
    load(checkpoint, mesh_of(1, 1), stream=True)
    assert checkpoint.weights_digest == expected
    load(checkpoint, mesh_of(1, 1))
    assert checkpoint.weights_digest == expected
    service.hub.faults = [Fault("*", status=503)]
    pinned = replace(service.request, revision=checkpoint.repository.revision)
    assert service.open().weights_digest == expected
    for policy in (Policy(), VERIFY):
        warm = open_checkpoint(pinned, policy)
        load(warm, mesh_of(1, 1))
        assert warm.weights_digest == expected


@EACH_HUB
def test_a_copy_is_verified_again_if_that_is_asked(service: Service) -> None:
    path = damaged_copy(service)
    error = refusal(open_checkpoint(service.request, VERIFY))
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert error.message.startswith(SHARD)
    load(open_checkpoint(service.request, VERIFY), mesh_of(1, 1))
    assert path.read_bytes() == FILES[SHARD]


@HUGGINGFACE
def test_the_digest_is_of_the_weights_and_the_config(service: Service) -> None:
    changes: dict[str, Mapping[str, bytes]] = {
        "nothing": {},
        "other files": {"README.md": b"# Another", "tokenizer.json": b"{}"},
        "the config": {"config.json": FILES["config.json"] + b"\n"},
        "a weight": {SHARD: FILES[SHARD][:-1] + b"\x01"},
    }
    found = {}
    for name, change in changes.items():
        service.hub.push("org/tiny", FILES | change)  # type: ignore[attr-defined]
        found[name] = service.open().weights_digest
    assert found["nothing"] == found["other files"]
    assert len(set(found.values())) == 3


@HUGGINGFACE
def test_what_others_fetched_has_the_digest_of_the_hub(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = service.open().weights_digest
    huggingface_hub.snapshot_download("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    revision = str(service.hub.repos["org/tiny"].refs["main"])  # type: ignore[attr-defined]
    assert open_checkpoint(replace(service.request, revision=revision)).weights_digest == expected


@HUGGINGFACE
def test_small_files_are_verified_by_the_digest_that_git_has(service: Service) -> None:
    config = fetch(service.open()) / "config.json"
    content = config.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    assert config.resolve().name == blob  # as the hub's own client has it
    config.resolve().write_bytes(content.replace(b"{\n", b"{ ", 1))
    with pytest.raises(ModelError, match=rf"CHECKPOINT_CORRUPT.*config.json.*git {blob}"):
        fetch(service.open())
    assert (fetch(service.open()) / "config.json").read_bytes() == content


@KAGGLE
def test_without_a_digest_of_the_hub_it_is_of_the_revision_until_all_is_read(
    service: Service,
) -> None:
    """What kagglehub downloaded was checked by it, and left without digests."""
    path = service.request.model_path
    folder = Path(kagglehub.model_download(path))
    expected = manifest("revision", lambda name: f"{path}@1")
    load(unread := service.open(), mesh_of(1, 1))
    assert unread.weights_digest == expected
    checkpoint = open_checkpoint(service.request, VERIFY)
    assert checkpoint.weights_digest == expected
    load(checkpoint, mesh_of(1, 1))
    assert checkpoint.weights_digest == CONTENT
    damage(folder / SHARD)
    changed = open_checkpoint(service.request, VERIFY)
    load(changed, mesh_of(1, 1))
    assert changed.weights_digest not in (CONTENT, expected)


# Directories


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(0, 1_700_000_000_000_000_000))
    return folder


def open_folder(folder: Path, policy: Policy | None = None, to: Path | str = "") -> Checkpoint:
    request = ModelRequest("tiny", ModelSource.INTERNAL, str(folder), download_path=str(to))
    return open_checkpoint(request, policy)


def test_a_directory_is_told_by_sizes_times_and_headers(folder: Path) -> None:
    def known(name: str) -> str:
        header = FILES[name][: 8 + int.from_bytes(FILES[name][:8], "little")]
        digest = hashlib.sha256(header).hexdigest()
        return f"{len(FILES[name])}:1700000000000000000:{digest}"

    assert open_folder(folder).weights_digest == manifest("stat", known)


def _touched(folder: Path) -> None:
    os.utime(folder / SHARD, ns=(0, 1_700_000_000_000_000_001))


def _other_header(folder: Path) -> None:
    """Another order of the header's keys: the size and the time are as they were."""
    content = FILES[SHARD]
    start = 8 + int.from_bytes(content[:8], "little")
    entries = reversed(json.loads(content[8:start]).items())
    other = json.dumps(dict(entries), separators=(",", ":")).encode().ljust(start - 8)
    (folder / SHARD).write_bytes(content[:8] + other + content[start:])
    assert len(content) == (folder / SHARD).stat().st_size
    os.utime(folder / SHARD, ns=(0, 1_700_000_000_000_000_000))


def _other_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(FILES["config.json"] + b"\n")


def _none(folder: Path) -> None:
    os.utime(folder / "config.json")
    (folder / "README.md").write_text("# A model")


@pytest.mark.parametrize(
    ("change", "tells"),
    [(_touched, True), (_other_header, True), (_other_config, True), (_none, False)],
)
def test_a_change_in_a_directory_shows(
    folder: Path, change: Callable[[Path], None], tells: bool
) -> None:
    before = open_folder(folder).weights_digest
    assert open_folder(folder).weights_digest == before
    change(folder)
    assert (open_folder(folder).weights_digest != before) == tells


def test_an_orbax_tree_in_a_directory_is_told_by_its_metadata(tmp_path: Path) -> None:
    def digest(metadata: bytes, chunk: bytes) -> str:
        for name, content in {"step/_METADATA": metadata, "step/d/0": chunk}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
            os.utime(tmp_path / name, ns=(0, 7))
        repository = open_repository(
            ModelRequest("tiny", ModelSource.INTERNAL, str(tmp_path)), Policy()
        )
        return combine(repository.files, claims_of(repository, repository.files))

    line = f"step/_METADATA\0002\0002:7:{hashlib.sha256(b'{}').hexdigest()}\n"
    line += f"step/d/0\0001\0001:7:{hashlib.sha256(b'').hexdigest()}\n"
    assert digest(b"{}", b"x") == f"stat:{hashlib.sha256(line.encode()).hexdigest()}"
    assert digest(b"{}", b"y") == digest(b"{}", b"x")  # no more than it promises
    assert digest(b"[]", b"x") != digest(b"{}", b"x")


@pytest.mark.parametrize("copied", [False, True], ids=["in place", "copied"])
def test_a_verified_directory_is_told_by_its_content(
    folder: Path, tmp_path: Path, copied: bool
) -> None:
    checkpoint = open_folder(folder, VERIFY, tmp_path / "copy" if copied else "")
    assert checkpoint.weights_digest.startswith("stat:")
    monitor = LoadMonitor()
    load(checkpoint, mesh_of(1, 1), monitor)
    assert checkpoint.weights_digest == CONTENT
    total = sum(len(FILES[n]) for n in (FILES if copied else WEIGHTS)) * (1 + copied)
    fetched = replace(monitor.stages()["fetch"], seconds=0.0)
    assert fetched == Stage(total, total)
    os.utime(folder / SHARD)
    load(again := open_folder(folder, VERIFY), mesh_of(1, 1))
    assert again.weights_digest == CONTENT
    damage(folder / SHARD)
    load(other := open_folder(folder, VERIFY), mesh_of(1, 1))
    assert other.weights_digest not in (CONTENT, checkpoint.weights_digest)


def test_a_verified_directory_and_a_hub_have_the_same_digest_under_another_name() -> None:
    hub = manifest("hub", lambda name: STATED["huggingface"](FILES[name]))
    assert hub.partition(":")[2] == CONTENT.partition(":")[2]


def test_a_load_that_verifies_can_be_cancelled(folder: Path) -> None:
    monitor = LoadMonitor()
    monitor.cancel()
    error = refusal(open_folder(folder, VERIFY), monitor)
    assert error.reason is Reason.LOAD_CANCELLED


@pytest.mark.parametrize("change", ["replaced", "gone"])
def test_a_directory_that_changes_before_the_load_has_ended_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    placed = automodel.place

    def place(*args: Any) -> Any:
        """The file is another by the time that it is opened."""
        _touched(folder)
        params = placed(*args)
        if change == "gone":
            (folder / SHARD).unlink()
        return params

    checkpoint = open_folder(folder)
    monkeypatch.setattr(automodel, "place", place)
    error = refusal(checkpoint)
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert error.message.startswith(SHARD)


# The flag


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Policy]:
    """The policies of servers that are started, but for all else."""
    policies: list[Policy] = []

    def policy(**fields: Any) -> Policy:
        policies.append(Policy(**fields))
        return policies[-1]

    async def serve(*_: object) -> int:
        return 0

    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's, which the server would remove
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    monkeypatch.setattr(main, "_engine", lambda _: EngineDouble())
    monkeypatch.setattr(main, "Policy", policy)
    monkeypatch.setattr(main, "serve", serve)
    return policies


def test_the_flag_is_part_of_the_policy(served: list[Policy]) -> None:
    assert main.main([]) == main.main(["--verify"]) == 0
    assert [policy.verify for policy in served] == [False, True]


def test_what_is_streamed_cannot_be_verified(
    served: list[Policy], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["--stream", "--verify"]) == 1
    assert "choose one" in capsys.readouterr().err
    assert served == []
