"""The Kaggle source, against a hub on loopback: all is real but the hub."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import kagglehub
import numpy as np
import pytest

import hubs
from downloads import contents, fetch, no_thread_fetches, seconds_to_cancel, sharded, until
from kaggle_hub import Kaggle
from loopback import Fault
from moorage_models.automodel import AutoModel
from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_models.sources import (
    ModelRequest,
    ModelSource,
    Policy,
    kaggle_api,
    open_repository,
    remote,
)

HANDLE = "org/model/transformers/1b-it"
STORED = "org/model/TRANSFORMERS/1b-it"  # as the API names the framework
SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
LAST = SHARDS[-1]
STRAYS = {f"extra/{i:02}.bin": b"stray" * 100 for i in range(60)} | {"README.md": b"# A model"}


def checkpoint_files() -> dict[str, bytes]:
    """A checkpoint in four files, and two more that a load brings."""
    return {
        **sharded(4),
        "tokenizer/vocab.json": b"{}",
        "vocab.json": b'{"code": 500, "message": 501}',  # words, which are not an error
        "merges.txt": b"#version: 0.2",
    }


FILES = {**checkpoint_files(), **STRAYS}  # three pages of a listing
NEEDED = {n: c for n, c in FILES.items() if n not in STRAYS and n != "tokenizer/vocab.json"}
NEEDED_BYTES = sum(map(len, NEEDED.values()))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kaggle]:
    """A hub that the client goes to, with one version."""
    with hubs.kagglehub(monkeypatch, tmp_path) as hub:
        hub.push(STORED, FILES)
        yield hub


def open_it(
    version: int | str = "", path: Path | str = "", policy: Policy | None = None, at: str = HANDLE
) -> Checkpoint:
    request = ModelRequest("label", ModelSource.KAGGLE, at, str(version), str(path))
    return open_checkpoint(request, policy)


def refusal(checkpoint: Checkpoint | None = None, **kwargs: Any) -> ModelError:
    """The error with which opening or fetching ends."""
    with pytest.raises(ModelError) as caught:
        fetch(checkpoint or open_it(**kwargs))
    return caught.value


def cache(tmp_path: Path, version: int = 1) -> Path:
    return tmp_path / "cache" / "models" / HANDLE / str(version)


# What a load reads and brings


def test_a_load_reads_headers_and_then_brings_what_the_plan_needs(
    hub: Kaggle, tmp_path: Path
) -> None:
    checkpoint = open_it()
    headers = sum(8 + struct.unpack("<Q", FILES[shard][:8])[0] for shard in SHARDS)
    assert hub.sent("GET */model-0*") == headers
    assert len(hub.lines("POST ListModelInstanceVersionFiles")) == 3
    assert not (tmp_path / "cache").exists()
    hub.log.clear()
    assert fetch(checkpoint) == cache(tmp_path)
    assert contents(cache(tmp_path)) == NEEDED
    assert hub.sent("GET *") == NEEDED_BYTES
    assert not list(tmp_path.rglob("*.complete"))


def test_the_parameters_are_those_of_the_same_files_on_disk(hub: Kaggle, golden: Path) -> None:
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"))
    model, folder = AutoModel.from_pretrained("qwen3-0.6b", mesh, ModelSource.KAGGLE, HANDLE)
    expected, _ = AutoModel.from_pretrained(
        "qwen3-0.6b", mesh, ModelSource.INTERNAL, str(golden / "qwen3_tied")
    )
    assert contents(Path(folder)) == NEEDED
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True)
    for value, other in pairs:
        np.testing.assert_array_equal(np.asarray(value), np.asarray(other))


def test_the_policy_limits_download_paths_and_variations(hub: Kaggle, tmp_path: Path) -> None:
    policy = Policy(roots=(tmp_path / "allowed",), places=("kaggle:org/model/*",))
    for refused in ({"path": tmp_path / "elsewhere"}, {"at": "other/model/flax/2b"}):
        assert refusal(policy=policy, **refused).reason is Reason.SOURCE_NOT_ALLOWED
    assert hub.log == []
    here = tmp_path / "allowed" / "here"
    assert fetch(open_it(path=here, policy=policy)) == here / "models" / HANDLE / "1"
    assert not (tmp_path / "cache").exists()


def test_files_in_folders_of_another_framework_are_brought_to_such_folders(hub: Kaggle) -> None:
    files = {"2b/_METADATA": b"{}", "2b/d/0a": b"chunk", "2b/empty": b"", "tokenizer.model": b"p"}
    hub.push("org/model/FLAX/2b", files | {"7b/d/0a": b"another"})
    request = ModelRequest("label", ModelSource.KAGGLE, "org/model/flax/2b")
    repository = open_repository(request, Policy())
    assert repository.read("2b/d/0a", 1, 3) == b"hu"
    names = [name for name in files if name.startswith("2b/")]
    assert contents(repository.fetch(names, LoadMonitor())) == files


def test_names_that_lead_out_of_the_folder_are_not_files(hub: Kaggle) -> None:
    hub.push(STORED, FILES | {"../escape.json": b"{}", "/etc/escape.json": b"{}"})
    assert open_it().repository.files.keys() == FILES.keys()


# Versions, warm and offline


def test_the_latest_version_is_pinned_and_a_warm_one_costs_no_request(
    hub: Kaggle, tmp_path: Path
) -> None:
    checkpoint = open_it()
    hub.push(STORED, FILES)
    assert fetch(checkpoint) == cache(tmp_path, 1)
    assert open_it().repository.revision == "2"
    hub.log.clear()
    for version, at in ((1, HANDLE), ("", f"{HANDLE}/1"), (1, f"{HANDLE}/1")):
        monitor = LoadMonitor()
        assert fetch(open_it(version, at=at), monitor) == cache(tmp_path, 1)
        assert monitor.stages()["fetch"].done == NEEDED_BYTES
    assert hub.log == []


def refuse_connections(hub: Kaggle) -> None:
    hub.__exit__(None, None, None)


def answer_503(hub: Kaggle) -> None:
    hub.faults.append(Fault("*", status=503))


@pytest.mark.parametrize("outage", [refuse_connections, answer_503])
def test_without_kaggle_what_is_here_is_used(hub: Kaggle, tmp_path: Path, outage: Any) -> None:
    fetch(open_it())
    hub.push(STORED, FILES)
    outage(hub)
    assert contents(fetch(open_it())) == NEEDED
    assert refusal(version=2).reason is Reason.SOURCE_UNAVAILABLE
    (cache(tmp_path) / "config.json").unlink()
    assert refusal().reason is Reason.SOURCE_UNAVAILABLE


@pytest.mark.parametrize("version", ["", 2])
def test_what_kagglehub_downloaded_is_used(hub: Kaggle, tmp_path: Path, version: Any) -> None:
    files = {n: NEEDED[n] for n in NEEDED if n != "vocab.json"}  # which kagglehub cannot fetch
    hub.push(STORED, files)
    assert Path(kagglehub.model_download(HANDLE)) == cache(tmp_path, 2)
    refuse_connections(hub)
    assert contents(fetch(open_it(version))) == files
    assert contents(fetch(open_it(2))) == files  # from the record


def test_what_kagglehub_did_not_finish_is_verified_and_completed(
    hub: Kaggle, tmp_path: Path
) -> None:
    cache(tmp_path).mkdir(parents=True)
    (cache(tmp_path) / "config.json").write_bytes(FILES["config.json"])
    (cache(tmp_path) / "merges.txt").write_bytes(b"#version: 0.1")
    (cache(tmp_path) / LAST).write_bytes(FILES[LAST][:1000])
    checkpoint = open_it()
    hub.log.clear()
    error = refusal(checkpoint)
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert "merges.txt" in error.message
    assert contents(fetch(checkpoint)) == NEEDED
    # A byte each time, with which the digest comes; the refusal may have been before the first.
    assert 1 <= hub.sent("GET */config.json") <= 2


def test_kagglehub_does_not_take_a_load_for_a_download_of_all(hub: Kaggle) -> None:
    some = {n: NEEDED[n] for n in NEEDED if n != "vocab.json"} | {"README.md": b"# A model"}
    hub.push(STORED, some)
    assert "README.md" not in contents(fetch(open_it()))
    assert contents(Path(kagglehub.model_download(HANDLE))) == some


# Errors


class Case(NamedTuple):
    reason: Reason
    says: str
    at: str = HANDLE
    version: str = ""
    account: tuple[str, str] = ("", "")
    gated: bool = False
    private: bool = False


AUTH, UNKNOWN = Reason.SOURCE_AUTH_REQUIRED, Reason.CHECKPOINT_NOT_FOUND
PATH, INVALID = Reason.MODEL_PATH_REQUIRED, Reason.INVALID_REQUEST
ERRORS = {
    "no consent, nobody": Case(AUTH, "KAGGLE_USERNAME and KAGGLE_KEY", gated=True),
    "no consent": Case(AUTH, "accept the licence", account=("bob", "other"), gated=True),
    "revoked": Case(AUTH, "was refused", account=("alice", "stale")),
    "private": Case(AUTH, "KAGGLE_API_TOKEN", private=True),
    "unknown": Case(UNKNOWN, "check the path", at="org/model/flax/none"),
    "unknown version": Case(UNKNOWN, "check the path", version="7"),
    "two versions": Case(INVALID, "'2'", at=f"{HANDLE}/1", version="2"),
    "branch": Case(INVALID, "a number", version="main"),
    "no path": Case(PATH, "owner/model/framework/variation", at=""),
    "short": Case(PATH, "owner/model/framework/variation", at="org/model"),
    "version 0": Case(PATH, "variation/version", at=f"{HANDLE}/0"),
    "framework": Case(PATH, "owner/model/framework", at="org/model/cobol/1b-it"),
    "parent": Case(PATH, "owner/model", at="org/../transformers/1b-it"),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS.keys())
def test_errors_say_what_to_do(hub: Kaggle, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    hub.variations[STORED].gated, hub.variations[STORED].private = case.gated, case.private
    monkeypatch.setenv("KAGGLE_USERNAME", case.account[0])
    monkeypatch.setenv("KAGGLE_KEY", case.account[1])
    error = refusal(version=case.version, at=case.at)
    assert error.reason is case.reason
    assert case.says in error.message
    assert "stale" not in error.message


@pytest.mark.parametrize("kind", ["username", "token", "file", "broken file"])
def test_credentials_are_kagglehubs_and_go_to_the_api_alone(
    hub: Kaggle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    hub.variations[STORED].gated = hub.variations[STORED].private = True
    settings = {
        "username": {"KAGGLE_USERNAME": "alice", "KAGGLE_KEY": "granted"},
        "token": {"KAGGLE_API_TOKEN": "KGAT_granted"},
    }
    for name, value in settings.get(kind, {}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config").mkdir()
    if kind.endswith("file"):
        account = '{"username": "alice", "key": "granted"}'[: -1 if kind == "broken file" else None]
        (tmp_path / "config" / "kaggle.json").write_text(account)
    if kind == "broken file":
        error = refusal()
        assert error.reason is AUTH
        assert "kaggle.json" in error.message
        assert str(tmp_path) not in error.message
        return
    fetch(open_it())
    assert {bool(r.account) for r in hub.log if r.line.startswith("POST")} == {True}
    assert {r.account for r in hub.log if r.line.startswith("GET")} == {""}


STAGES = ["POST Get*", "POST List*", "POST Download*/config.json", f"GET */{LAST}"]


@pytest.mark.parametrize(("pattern", "status"), [*zip(STAGES, [429, 500, 503, 429], strict=True)])
def test_a_hub_that_is_down_is_tried_again_and_then_unavailable(
    hub: Kaggle, pattern: str, status: int
) -> None:
    fault = Fault(pattern, status=status, times=3)
    hub.faults.append(fault)
    open_it()
    assert fault.times == 0
    fault.times = 4
    error = refusal()
    assert error.reason is Reason.SOURCE_UNAVAILABLE
    assert f"answers {status}: try later" in error.message
    assert contents(fetch(open_it())) == NEEDED


@pytest.mark.parametrize("kind", ["cut", "stall", "length", "flip"])
def test_the_next_attempt_takes_up_what_was_right(
    hub: Kaggle, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(kaggle_api, "TIMEOUT", (1.0, 0.2))
    checkpoint = open_it()
    hub.faults.append(Fault(f"GET */{LAST}", **{kind: 9000}))
    refusal(checkpoint)
    hub.faults.clear()
    hub.log.clear()
    assert contents(fetch(checkpoint)) == NEEDED
    (asked,) = [r.range for r in hub.log if r.line.startswith("GET") and r.line.endswith(LAST)]
    assert asked == ("bytes=32768-" if kind in {"cut", "stall"} else "")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_taken_up_where_it_broke(hub: Kaggle, ranges: bool) -> None:
    checkpoint = open_it()
    hub.log.clear()
    hub.ranges = ranges
    hub.faults.append(Fault(f"GET */{LAST}", cut=(1 << 12) + 9, times=3))
    assert contents(fetch(checkpoint)) == NEEDED
    asked = [r.range for r in hub.log if r.line.endswith(LAST) and r.line.startswith("GET")]
    places = [1, 2, 3] if ranges else [1, 1, 1]
    assert asked == ["", *(f"bytes={place << 12}-" for place in places)]


def test_what_cannot_fit_is_refused_before_it_is_fetched(
    hub: Kaggle, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_it()
    hub.log.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=NEEDED_BYTES - 1))
        error = refusal(checkpoint)
    assert error.reason is Reason.DISK_FULL
    assert "KAGGLEHUB_CACHE or model_download_path" in error.message
    assert hub.log == []
    assert contents(fetch(checkpoint)) == NEEDED


def test_half_fetched_files_are_gone_on_with_or_removed(hub: Kaggle, tmp_path: Path) -> None:
    hub.push(STORED, FILES)
    checkpoint = open_it(2)
    hub.log.clear()
    for version, name in ((1, LAST), (2, LAST), (2, "config.json")):
        cache(tmp_path, version).mkdir(parents=True, exist_ok=True)
        (cache(tmp_path, version) / f"{name}.moorage.partial").write_bytes(FILES[name][:7])
    (cache(tmp_path, 2) / f"{SHARDS[0]}.moorage.partial").write_bytes(FILES[SHARDS[0]] + b"more")
    (cache(tmp_path, 2) / "config.json").write_bytes(FILES["config.json"])
    assert contents(fetch(checkpoint)) == NEEDED
    assert [r.range for r in hub.log if r.line == f"GET /storage/{STORED}/2/{LAST}"] == ["bytes=7-"]
    assert not list(tmp_path.rglob("*.partial"))


# Progress, cancellation, silence


def test_progress_reaches_its_total_and_never_passes_it(
    hub: Kaggle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PARALLEL_FILES", 1)  # else the order of sums is by chance
    checkpoint = open_it()
    sums = [0]

    class Counts(LoadMonitor):
        def advance(self, stage: str, count: int) -> None:
            super().advance(stage, count)
            sums.append(sums[-1] + count)

    hub.faults.append(Fault(f"GET */{LAST}", cut=(1 << 13) + 9, times=1))
    fetch(checkpoint, Counts())
    assert max(sums) == sums[-1] == NEEDED_BYTES
    assert max(b - a for a, b in pairwise(sums)) <= 1 << 13  # one taken up


def test_a_cancelled_load_ends_at_once_and_its_threads_soon(hub: Kaggle) -> None:
    checkpoint = open_it()
    hub.pause = 0.2
    assert 0.3 <= seconds_to_cancel(checkpoint) < 1.3
    hub.pause = 0.0
    assert contents(fetch(checkpoint)) == NEEDED
    until(no_thread_fetches)


def test_nothing_is_printed(
    hub: Kaggle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")  # prints the credential, if heeded
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_granted")
    hub.faults.append(Fault("GET *", cut=1000, times=3))
    hub.faults.append(Fault("POST *", status=503, times=3))
    fetch(open_it())
    hub.faults.append(Fault("GET *", cut=1000))
    hub.push(STORED, FILES)
    refusal()
    assert capfd.readouterr() == ("", "")
    assert "KGAT_granted" not in caplog.text
