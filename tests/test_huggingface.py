"""The Hugging Face source, against a hub on loopback: both are real but the hub."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

import downloads
import hubs
from downloads import fetch, no_thread_fetches, sharded, until
from hub import Hub
from loopback import Fault
from moorage_models.automodel import AutoModel, load
from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_models.sources import ModelRequest, ModelSource, Policy, remote
from moorage_models.sources.progress import FileProgress

ID = "org/Model-1b"

#: What a repository holds beside its checkpoint, and whether a load brings it.
COMPANIONS = {
    "generation_config.json": b'{"eos_token_id": 1}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"pieces",
    "tokenizer_config.json": b'{"model_max_length": 64}',
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
    "vocab.json": b'{"</s>": 1}',
    "merges.txt": b"#version: 0.2",
    "chat_template.jinja": b"{{ messages }}",
}
STRAYS = {
    "README.md": b"# A model",
    ".gitattributes": b"*.bin filter=lfs",
    "pytorch_model.bin": b"pickle" * 100,
    "consolidated.safetensors": b"stray" * 100,
    "original/consolidated.00.pth": b"pickle" * 100,
    "original/tokenizer.model": b"pieces",
    "onnx/model.bin": b"graph" * 100,
    "tokenizer/model.bin": b"graph" * 100,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hubs.huggingface(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A checkpoint in four files, and what else repositories hold."""
    return {**sharded(4), **COMPANIONS, **STRAYS}


def read_files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".npz"}


def open_it(revision: str = "", path: Path | str = "", policy: Policy | None = None) -> Checkpoint:
    request = ModelRequest(ID, revision=revision, download_path=str(path))
    return open_checkpoint(request, policy)


def refusal(*args: Any, **kwargs: Any) -> ModelError:
    """The error with which opening and fetching ends."""
    with pytest.raises(ModelError) as caught:
        fetch(open_it(*args, **kwargs))
    return caught.value


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder as a user of the snapshot sees them."""
    held = downloads.contents(folder)
    return {name: held[name] for name in held if ".cache" not in name.split("/")}


def weights(files: dict[str, bytes]) -> list[str]:
    return sorted(name for name in files if name.startswith("model-"))


def needed(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in STRAYS}


def header_bytes(content: bytes) -> int:
    return 8 + int(struct.unpack("<Q", content[:8])[0])


def blob(commit: str, name: str) -> Path:
    """The file that a file of a snapshot leads to."""
    return (cache() / "snapshots" / commit / name).resolve()


def cache() -> Path:
    return Path(constants.HF_HUB_CACHE) / "models--org--Model-1b"


def flip(path: Path) -> None:
    """Damages a file without a change of size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


# What a load reads and brings


def test_opening_reads_metadata_configs_and_headers_alone(
    hub: Hub, files: dict[str, bytes]
) -> None:
    hub.push(ID, files)
    checkpoint = open_it()
    assert list(checkpoint.plan.files) == sorted(weights(files))
    headers = sum(header_bytes(files[name]) for name in weights(files))
    assert hub.sent("GET /cdn/*") == headers
    small = [r.line.split("/")[-1] for r in hub.log if r.sent and r.line.startswith("GET /org/")]
    assert sorted(small) == [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer_config.json",
    ]
    assert not Path(constants.HF_HUB_CACHE).exists()


def wrong_shape(files: dict[str, bytes]) -> dict[str, bytes]:
    config = json.loads(files["config.json"])
    config["vocab_size"] += 1
    return files | {"config.json": json.dumps(config).encode()}


def wrong_architecture(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"config.json": b'{"architectures": ["GPT2LMHeadModel"]}'}


def lacking(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: files[name] for name in files if name != weights(files)[0]}


def truncated(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {name: files[name][:-1] for name in weights(files)[:1]}


def cut_within_header(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {name: files[name][:100] for name in weights(files)[:1]}


def no_index(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"model.safetensors.index.json": b"{"}


def no_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {n: files[n] for n in files if not n.endswith((".safetensors", ".index.json"))}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (wrong_shape, Reason.CHECKPOINT_MISMATCH),
        (wrong_architecture, Reason.CHECKPOINT_UNSUPPORTED),
        (lacking, Reason.CHECKPOINT_CORRUPT),
        (truncated, Reason.CHECKPOINT_CORRUPT),
        (cut_within_header, Reason.CHECKPOINT_CORRUPT),
        (no_index, Reason.CHECKPOINT_CORRUPT),
        (no_weights, Reason.CHECKPOINT_NOT_FOUND),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_a_weight_moves(
    hub: Hub, files: dict[str, bytes], spoil: Any, reason: Reason
) -> None:
    spoiled = spoil(files)
    hub.push(ID, spoiled)
    assert refusal().reason is reason
    headers = sum(header_bytes(files[n]) for n in weights(spoiled))
    assert hub.sent("GET /cdn/*") <= headers
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_a_load_brings_what_the_plan_needs_and_what_makes_it_a_snapshot(
    hub: Hub, files: dict[str, bytes]
) -> None:
    hub.push(ID, files)
    checkpoint = open_it()
    hub.log.clear()
    folder = fetch(checkpoint)
    assert contents(folder) == needed(files)
    assert hub.sent("GET /*") == sum(map(len, needed(files).values()))
    assert folder == cache() / "snapshots" / checkpoint.repository.revision


def test_files_of_the_index_that_the_plan_does_not_need_stay_away(hub: Hub, golden: Path) -> None:
    files = read_files(golden / "gemma3_mm_27b")
    hub.push(ID, files)
    assert files.keys() - contents(fetch(open_it())).keys() == {"model-00001-of-00009.safetensors"}


def test_a_download_path_gets_the_files_themselves(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.push(ID, files)
    assert fetch(open_it(path=tmp_path / "here")) == tmp_path / "here"
    assert contents(tmp_path / "here") == needed(files)
    assert not any(path.is_symlink() for path in (tmp_path / "here").rglob("*"))
    assert not (cache() / "snapshots").exists()


def test_a_download_path_lies_under_the_roots(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.push(ID, files)
    policy = Policy(roots=(tmp_path / "allowed",))
    error = refusal(path=tmp_path / "elsewhere", policy=policy)
    assert error.reason is Reason.SOURCE_NOT_ALLOWED
    assert hub.log == []
    fetch(open_it(path=tmp_path / "allowed" / "here", policy=policy))


@pytest.mark.parametrize("name", ["qwen3_tied", "gemma3_mm_27b"])
def test_the_parameters_are_those_of_the_same_files_on_disk(
    hub: Hub, golden: Path, name: str
) -> None:
    hub.push(ID, read_files(golden / name))
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"))
    params, _ = load(open_it(), mesh)
    local = ModelRequest(ID, ModelSource.INTERNAL, str(golden / name))
    expected, _ = load(open_checkpoint(local), mesh)
    assert params.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(np.asarray(params[key]), np.asarray(value))


def test_auto_model_takes_the_repository_from_the_path_and_returns_the_snapshot(
    hub: Hub, golden: Path
) -> None:
    files = {**read_files(golden / "qwen3_tied"), **COMPANIONS}
    hub.push(ID, files)
    mesh = jax.make_mesh((8,), ("fsdp",))
    _, folder = AutoModel.from_pretrained("qwen3-0.6b", mesh, model_path=ID)
    assert contents(Path(folder)) == files


def test_a_branch_is_resolved_once(hub: Hub, files: dict[str, bytes]) -> None:
    first = hub.push(ID, files)
    checkpoint = open_it()
    moved = files | {"tokenizer.json": b'{"version": "2.0"}'}
    moved |= {name: files[name][:-1] + b"\0" for name in weights(files)}
    second = hub.push(ID, moved)
    assert contents(fetch(checkpoint)) == needed(files)
    assert checkpoint.repository.revision == first
    assert open_it().repository.revision == second
    assert open_it(first).repository.revision == first


def test_tags_and_names_with_slashes_are_revisions(hub: Hub, files: dict[str, bytes]) -> None:
    commit = hub.push(ID, files, branch="refs/pr/1")
    assert open_it("refs/pr/1").repository.revision == commit
    fetch(open_it("refs/pr/1"))
    assert (cache() / "refs" / "refs" / "pr" / "1").read_text() == commit


def test_a_token_goes_to_the_hub_alone(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    hub.push(ID, files)
    hub.repos[ID].gated = True
    hub.repos[ID].private = True
    fetch(open_it())
    tokens = {request.line.split()[1].split("/")[1]: request.token for request in hub.log}
    assert tokens == {"api": "hf_granted", "org": "hf_granted", "cdn": ""}


def test_names_that_lead_out_of_the_folder_are_not_files(hub: Hub, files: dict[str, bytes]) -> None:
    index = json.loads(files["model.safetensors.index.json"])
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../../escape.safetensors"
    evil = {"model.safetensors.index.json": json.dumps(index).encode()}
    hub.push(ID, files | evil | {"../../escape.safetensors": files[weights(files)[0]]})
    assert refusal().reason is Reason.CHECKPOINT_CORRUPT


# Warm and offline


PLACES = pytest.mark.parametrize("place", ["", "here"], ids=["cache", "download path"])


@PLACES
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3_mm_27b"])
def test_a_warm_commit_costs_no_request(
    hub: Hub, golden: Path, tmp_path: Path, place: str, name: str
) -> None:
    commit = hub.push(ID, read_files(golden / name) | STRAYS)
    path = tmp_path / place if place else ""
    cold = fetch(open_it(path=path))
    before = contents(cold)
    hub.log.clear()
    monitor = LoadMonitor()
    assert fetch(open_it(commit, path), monitor) == cold
    assert contents(cold) == before
    assert hub.log == []
    stage = monitor.stages()["fetch"]
    assert stage.done == stage.total == sum(map(len, before.values()))


def test_a_warm_branch_costs_one_request(hub: Hub, files: dict[str, bytes]) -> None:
    hub.push(ID, files)
    fetch(open_it())
    hub.log.clear()
    fetch(open_it())
    assert hub.lines() == [f"GET /api/models/{ID}/revision/main"]


def go_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refuse_connections(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.__exit__(None, None, None)
    huggingface_hub.close_session()


def answer_503(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.append(Fault("*", status=503))


OUTAGES = pytest.mark.parametrize("outage", [go_offline, refuse_connections, answer_503])


@OUTAGES
@PLACES
def test_without_the_hub_a_branch_is_what_it_was(
    hub: Hub,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: str,
    outage: Any,
) -> None:
    path = tmp_path / place if place else ""
    commit = hub.push(ID, files)
    fetch(open_it(path=path))
    outage(hub, monkeypatch)
    checkpoint = open_it(path=path)
    assert checkpoint.repository.revision == commit
    assert contents(fetch(checkpoint)) == needed(files)


@OUTAGES
def test_without_the_hub_a_cache_that_others_filled_is_used(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, outage: Any
) -> None:
    commit = hub.push(ID, files)
    huggingface_hub.snapshot_download(ID)
    outage(hub, monkeypatch)
    checkpoint = open_it()
    assert checkpoint.repository.revision == commit
    assert contents(fetch(checkpoint)) == files


@OUTAGES
@pytest.mark.parametrize("absent", ["config.json", "model-00003-of-00004.safetensors"])
def test_without_the_hub_a_cache_that_lacks_a_file_is_not_used(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, outage: Any, absent: str
) -> None:
    commit = hub.push(ID, files)
    huggingface_hub.snapshot_download(ID, ignore_patterns=[absent])
    outage(hub, monkeypatch)
    for revision in ("", commit):
        assert refusal(revision).reason is Reason.SOURCE_UNAVAILABLE


def test_a_partial_cache_is_completed(hub: Hub, files: dict[str, bytes]) -> None:
    commit = hub.push(ID, files)
    huggingface_hub.snapshot_download(ID, allow_patterns=["*.json", "model-00001-*"])
    hub.log.clear()
    assert needed(files).items() <= contents(fetch(open_it(commit))).items()
    fetched = {line.split("/")[-1] for line in hub.lines("HEAD /org/*")}
    assert fetched == {n for n in needed(files) if not n.endswith("json")} - {
        "model-00001-of-00004.safetensors"
    }


def test_a_lost_file_is_fetched_again(hub: Hub, files: dict[str, bytes]) -> None:
    commit = hub.push(ID, files)
    folder = fetch(open_it())
    (folder / "tokenizer.json").unlink()
    fetch(open_it(commit))
    assert contents(folder) == needed(files)


def test_a_cache_that_cannot_be_written_serves(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.push(ID, files)
    huggingface_hub.snapshot_download(ID)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert contents(fetch(open_it(commit))) == files


def test_the_hubs_own_tools_accept_the_cache(hub: Hub, files: dict[str, bytes]) -> None:
    hub.push(ID, files)
    fetch(open_it())
    info = huggingface_hub.scan_cache_dir()
    assert info.warnings == []
    (repo,) = info.repos
    assert repo.refs.keys() == {"main"}
    assert huggingface_hub.snapshot_download(ID, local_files_only=True)


# Errors


class Case(NamedTuple):
    reason: Reason
    says: str
    repo: str = ID
    revision: str = ""
    token: str = ""
    gated: bool = False
    private: bool = False


ERRORS = {
    "gated, no token": Case(Reason.SOURCE_AUTH_REQUIRED, "HF_TOKEN", gated=True),
    "gated, no grant": Case(
        Reason.SOURCE_AUTH_REQUIRED, "accept the terms", token="hf_other", gated=True
    ),
    "unknown token": Case(Reason.SOURCE_AUTH_REQUIRED, "HF_TOKEN was refused", token="hf_stale"),
    "private": Case(Reason.CHECKPOINT_NOT_FOUND, "HF_TOKEN", private=True),
    "unknown repository": Case(Reason.CHECKPOINT_NOT_FOUND, "check the id", repo="org/none"),
    "unknown branch": Case(Reason.CHECKPOINT_NOT_FOUND, "no such revision", revision="dev"),
    "unknown commit": Case(Reason.CHECKPOINT_NOT_FOUND, "no such revision", revision="0" * 40),
    "path as branch": Case(Reason.CHECKPOINT_NOT_FOUND, "be a revision", revision="../../main"),
    "no id": Case(Reason.MODEL_PATH_REQUIRED, "owner/name", repo="/models/x"),
    "odd id": Case(Reason.CHECKPOINT_NOT_FOUND, "repository's id", repo="org/a--b"),
    "odd id, pinned": Case(
        Reason.CHECKPOINT_NOT_FOUND, "repository's id", repo="org/a--b", revision="0" * 40
    ),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS.keys())
def test_errors_say_what_to_do(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    hub.push(ID, files)
    hub.repos[ID].gated, hub.repos[ID].private = case.gated, case.private
    if case.token:
        monkeypatch.setenv("HF_TOKEN", case.token)
    request = ModelRequest("label", model_path=case.repo, revision=case.revision)
    with pytest.raises(ModelError) as caught:
        fetch(open_checkpoint(request))
    assert caught.value.reason is case.reason
    assert case.says in caught.value.message
    assert not case.token or case.token not in caught.value.message


@pytest.mark.parametrize("pattern", ["GET /api/*", "GET /org/*/config.json", "GET /cdn/*"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_down_is_unavailable_and_tried_again(
    hub: Hub, files: dict[str, bytes], pattern: str, status: int
) -> None:
    hub.push(ID, files)
    fault = Fault(pattern, status=status, times=3)
    hub.faults.append(fault)
    fetch(open_it())
    assert fault.times == 0
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.faults.append(Fault(pattern, status=status))
    error = refusal()
    assert error.reason is Reason.SOURCE_UNAVAILABLE
    assert str(status) in error.message


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_goes_down_before_the_fetch_is_unavailable(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    hub.push(ID, files)
    checkpoint = open_it()
    # Here the client tries again by itself.
    monkeypatch.setattr("moorage_models.sources.failures.time", SimpleNamespace(sleep=pytest.fail))
    hub.faults.append(Fault("*", status=status))
    with pytest.raises(ModelError) as caught:
        fetch(checkpoint)
    assert caught.value.reason is Reason.SOURCE_UNAVAILABLE
    assert str(status) in caught.value.message
    hub.faults.clear()
    assert contents(fetch(checkpoint)) == needed(files)


def test_a_hub_that_refuses_connections_is_unavailable(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_connections(hub, monkeypatch)
    assert refusal().reason is Reason.SOURCE_UNAVAILABLE


def test_offline_without_the_checkpoint_says_so_at_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moorage_models.sources.failures.time", SimpleNamespace(sleep=pytest.fail))
    go_offline(hub, monkeypatch)
    error = refusal()
    assert error.reason is Reason.SOURCE_UNAVAILABLE
    assert "HF_HUB_OFFLINE" in error.message


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "full"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "cannot be written"),
        (RuntimeError("IO Error: No space left on device (os error 28)"), "full"),
    ],
)
def test_a_full_disk_is_told(
    hub: Hub,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    says: str,
) -> None:
    hub.push(ID, files)
    checkpoint = open_it()

    def http_get(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", http_get)
        with pytest.raises(ModelError, match=says) as caught:
            fetch(checkpoint)
    assert caught.value.reason is Reason.DISK_FULL
    assert contents(fetch(checkpoint)) == needed(files)


def test_what_cannot_fit_is_refused_before_it_is_fetched(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(ID, files)
    checkpoint = open_it()
    total = sum(map(len, needed(files).values()))
    hub.log.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=total - 1))
    with pytest.raises(ModelError, match=f"{total} bytes") as caught:
        fetch(checkpoint)
    assert caught.value.reason is Reason.DISK_FULL
    assert hub.log == []


def test_what_the_cache_holds_under_another_commit_needs_no_space(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(ID, files)
    fetch(open_it())
    hub.push(ID, files | {"README.md": b"# Another"})
    small = sum(len(c) for n, c in needed(files).items() if n not in weights(files))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=small))
    assert contents(fetch(open_it())) == needed(files)


# Broken and damaged downloads


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_broken_download_is_taken_up_again(hub: Hub, files: dict[str, bytes], cut: int) -> None:
    hub.push(ID, files)
    checkpoint = open_it()
    # The client itself tries six times, and so would hide that its caller tries again.
    fault = Fault(f"GET /cdn/*/{weights(files)[0]}", cut=cut, times=8)
    hub.faults.append(fault)
    assert contents(fetch(checkpoint)) == needed(files)
    assert fault.times == 0


@pytest.mark.parametrize("fault", [{"cut": 1000}, {"length": 1000}])
def test_a_download_that_stays_broken_is_unavailable_until_the_next_attempt(
    hub: Hub, files: dict[str, bytes], fault: dict[str, int]
) -> None:
    hub.push(ID, files)
    checkpoint = open_it()
    hub.faults.append(Fault(f"GET /cdn/*/{weights(files)[-1]}", **fault))
    with pytest.raises(ModelError) as caught:
        fetch(checkpoint)
    assert caught.value.reason is Reason.SOURCE_UNAVAILABLE
    hub.faults.clear()
    hub.log.clear()
    assert contents(fetch(checkpoint)) == needed(files)
    assert hub.lines("GET /cdn/*") == hub.lines(f"GET /cdn/*/{weights(files)[-1]}")
    assert not list(cache().rglob("*.incomplete"))


@PLACES
def test_a_file_that_is_damaged_on_the_way_is_corrupt_and_removed(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, place: str
) -> None:
    name = weights(files)[2]
    hub.push(ID, files)
    path = tmp_path / place if place else ""
    hub.faults.append(Fault(f"GET /cdn/*/{name}", flip=len(files[name]) - 1))
    error = refusal(path=path)
    assert error.reason is Reason.CHECKPOINT_CORRUPT
    assert name in error.message
    hub.faults.clear()
    assert contents(fetch(open_it(path=path))) == needed(files)


@PLACES
def test_a_file_that_is_damaged_on_this_machine_is_corrupt_and_fetched_again(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, place: str
) -> None:
    commit = hub.push(ID, files)
    path = tmp_path / place if place else ""
    folder = fetch(open_it(path=path))
    flip((folder / weights(files)[2]).resolve())
    assert refusal(commit, path).reason is Reason.CHECKPOINT_CORRUPT
    assert contents(fetch(open_it(commit, path))) == needed(files)


@OUTAGES
def test_a_cache_that_others_filled_is_verified_without_the_hub(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, outage: Any
) -> None:
    commit = hub.push(ID, files)
    huggingface_hub.snapshot_download(ID)
    flip(blob(commit, weights(files)[0]))
    outage(hub, monkeypatch)
    assert refusal().reason is Reason.CHECKPOINT_CORRUPT
    assert refusal().reason is Reason.SOURCE_UNAVAILABLE


def test_a_file_is_verified_once(hub: Hub, files: dict[str, bytes]) -> None:
    commit = hub.push(ID, files)
    huggingface_hub.snapshot_download(ID)
    fetch(open_it())
    path = blob(commit, weights(files)[0])
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    fetch(open_it())
    os.utime(path)
    assert refusal().reason is Reason.CHECKPOINT_CORRUPT


@pytest.mark.parametrize("record", ["", "[]", "{", '{"config.json": 1}', '{"a": {"size": 1}}'])
def test_a_record_that_is_damaged_is_forgotten(
    hub: Hub, files: dict[str, bytes], record: str
) -> None:
    commit = hub.push(ID, files)
    fetch(open_it())
    (cache() / "moorage" / commit / "files.json").write_text(record)
    assert contents(fetch(open_it(commit))) == needed(files)


def test_one_download_path_may_be_given_for_two_models(
    hub: Hub, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.push("org/first", read_files(golden / "qwen3_tied"))
    hub.push("org/second", read_files(golden / "qwen3_untied"))
    path = str(tmp_path / "here")
    one = ModelRequest("label", model_path="org/first", download_path=path)
    other = ModelRequest("label", model_path="org/second", download_path=path)
    fetch(open_checkpoint(one))
    fetch(open_checkpoint(other))
    pinned = ModelRequest("label", model_path="org/first", download_path=path, revision=first)
    assert contents(fetch(open_checkpoint(pinned))) == read_files(golden / "qwen3_tied")
    go_offline(hub, monkeypatch)
    with pytest.raises(ModelError) as caught:
        fetch(open_checkpoint(other))
    assert caught.value.reason is Reason.SOURCE_UNAVAILABLE


# Progress, cancellation, silence


class Counts(LoadMonitor):
    """A monitor that keeps what it is told, before it limits it."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = [0]

    def advance(self, stage: str, count: int) -> None:
        super().advance(stage, count)
        self.sums.append(self.sums[-1] + count)


def test_progress_reaches_its_total_and_never_passes_it(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    monkeypatch.setattr(remote, "_PARALLEL_FILES", 1)  # else the order of sums is by chance
    hub.push(ID, files)
    checkpoint = open_it()
    resumed, failed = weights(files)[:2]
    hub.faults.append(Fault(f"GET /cdn/*/{resumed}", cut=(1 << 13) + 9, times=1))
    hub.faults.append(Fault(f"GET /cdn/*/{failed}", length=1 << 13, times=1))
    monitor = Counts()
    fetch(checkpoint, monitor)
    total = sum(map(len, needed(files).values()))
    assert f"bytes={1 << 13}-" in [r.range for r in hub.log if r.line.endswith(resumed)]
    assert max(monitor.sums) == monitor.sums[-1] == total
    assert any(
        after < before for before, after in zip(monitor.sums, monitor.sums[1:], strict=False)
    )
    stage = monitor.stages()["fetch"]
    assert (stage.done, stage.total) == (total, total)


@pytest.mark.parametrize("failing", [False, True], ids=["cancelled", "failed"])
def test_downloads_of_a_load_that_is_over_stop(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 10)
    hub.push(ID, files)
    checkpoint = open_it()
    hub.log.clear()
    hub.faults.append(Fault("GET /cdn/*", stall=1 << 12))
    monitor = LoadMonitor()

    def cancel() -> None:
        until(lambda: len(hub.lines("GET /cdn/*")) == 4)
        monitor.cancel()

    if failing:
        hub.faults.append(Fault(f"HEAD /org/*/{weights(files)[3]}", status=404))
    else:
        threading.Thread(target=cancel).start()
    with pytest.raises(ModelError):
        fetch(checkpoint, monitor)
    hub.closed.set()  # now all breaks off, over and over
    until(no_thread_fetches)
    assert len(hub.lines("GET /cdn/*")) <= 8


def test_nothing_is_printed_and_no_thread_is_left(
    hub: Hub,
    files: dict[str, bytes],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = tqdm_monitors()
    hub.push(ID, files)
    hub.faults.append(Fault("GET /cdn/*", cut=1000, times=3))
    hub.faults.append(Fault("HEAD /org/*", status=503, times=3))
    fetch(open_it())
    hub.faults.append(Fault("GET /cdn/*", cut=1000))
    shutil.rmtree(constants.HF_HUB_CACHE)
    refusal()
    assert capfd.readouterr() == ("", "")
    assert [r for r in caplog.records if r.name.startswith("huggingface_hub")] == []
    assert tqdm_monitors() == before


def tqdm_monitors() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if type(t).__name__ == "TMonitor"]


def test_two_loads_of_one_checkpoint_at_once_both_succeed(
    hub: Hub, files: dict[str, bytes]
) -> None:
    hub.push(ID, files)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(fetch(open_it()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3
    assert contents(folders[0]) == needed(files)
    assert len([r for r in hub.log if r.line.startswith("GET /cdn/") and not r.range]) == 4


# Xet storage, through which the real hub serves most files


@pytest.fixture
def xet(hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, with the weights in a Xet storage that is a folder."""
    hf_xet = pytest.importorskip("hf_xet")
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    hub.cas = f"local://{tmp_path}/storage"
    (tmp_path / "storage").mkdir()
    with hf_xet.XetSession().new_upload_commit(endpoint=hub.cas) as commit:
        uploads = [commit.start_upload_bytes(files[name]) for name in weights(files)]
    stored = [upload.result().xet_info for upload in uploads]
    hub.xet = {
        hashlib.sha256(files[n]).hexdigest(): i.hash
        for n, i in zip(weights(files), stored, strict=True)
    }
    hub.push(ID, files)
    return hub


def test_a_load_from_xet_storage_is_like_any_other(
    xet: Hub, files: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_it()
    xet.log.clear()
    monitor = Counts()
    folder = fetch(checkpoint, monitor)
    assert contents(folder) == needed(files)
    assert xet.lines("GET /cdn/*") == []
    total = sum(map(len, needed(files).values()))
    assert max(monitor.sums) == monitor.sums[-1] == total
    assert capfd.readouterr() == ("", "")


def test_a_file_from_xet_storage_that_is_damaged_is_fetched_again(
    xet: Hub, files: dict[str, bytes]
) -> None:
    commit = open_it().repository.revision
    fetch(open_it())
    flip(blob(commit, weights(files)[0]))
    assert refusal().reason is Reason.CHECKPOINT_CORRUPT
    assert contents(fetch(open_it())) == needed(files)


def test_a_xet_storage_that_lacks_the_file_is_unavailable(xet: Hub) -> None:
    xet.cas = xet.url
    assert refusal().reason is Reason.SOURCE_UNAVAILABLE


def test_progress_from_xet_storage_is_that_of_the_file_and_not_of_the_network() -> None:
    monitor = LoadMonitor()
    monitor.expect("fetch", 100)
    bar = FileProgress(monitor, threading.Event(), 100).bar()
    report = SimpleNamespace(
        total_bytes=100,
        total_bytes_completed=20,
        total_bytes_completion_rate=1.0,
        total_transfer_bytes_completed=70,
        total_transfer_bytes_completion_rate=1.0,
    )
    with XetDownloadProgressReporter(
        reconstruction_desc="", log_level=logging.ERROR, tqdm_class=bar
    ) as reporter:
        reporter.update_progress(report)
        assert monitor.stages()["fetch"].done == 20
        monitor.cancel()
        report.total_bytes_completed = 30
        # In a thread of hf_xet, which prints what is raised; in that of the load it is raised.
        with ThreadPoolExecutor() as pool:
            pool.submit(reporter.update_progress, report).result()
        report.total_bytes_completed = 40
        with pytest.raises(ModelError):
            reporter.update_progress(report)


def test_a_cancelled_load_from_xet_storage_ends_at_once(
    xet: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    xet.cas = xet.url
    xet.faults.append(Fault("GET /v*/reconstructions*", stall=0))
    checkpoint = open_it()
    monitor = LoadMonitor()
    threading.Timer(0.5, monitor.cancel).start()
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        fetch(checkpoint, monitor)
    assert caught.value.reason is Reason.LOAD_CANCELLED
    assert time.monotonic() - start < 4
    assert xet.lines("GET /v*/reconstructions*")
    until(no_thread_fetches)
    assert capfd.readouterr() == ("", "")
