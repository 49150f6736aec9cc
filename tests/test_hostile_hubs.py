"""A hub may name, state and send what it likes: nothing is written or read but where it belongs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hub as huggingface_hub
import hubs
import kaggle_hub
from downloads import contents, fetch, sharded
from hostile import MIB, peak_bytes, refusal
from hub import Hub
from kaggle_hub import Kaggle
from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.sources import ModelRequest, ModelSource, Policy
from moorage_models.sources.progress import FileProgress

ID = "org/tiny"
STORED, HANDLE = "org/model/TRANSFORMERS/tiny", "org/model/transformers/tiny"
FILES = sharded(2)
INDEX = "model.safetensors.index.json"

#: Names that stand for no file below a folder, or cannot be shown.
NAMES = ["../escape", "../../../escape", "/escape", "a/../../escape", "a//escape", "./escape", ".."]
NAMES += ["a/", "escape\0.json", "escape\n.json", "\ud800escape", "a/\x1b[2Jescape"]

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hubs.huggingface(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def kaggle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kaggle]:
    with hubs.kagglehub(monkeypatch, tmp_path) as hub:
        hub.push(STORED, FILES)
        yield hub


REQUESTS = {
    ModelSource.HUGGINGFACE: ModelRequest("tiny", ModelSource.HUGGINGFACE, ID),
    ModelSource.KAGGLE: ModelRequest("tiny", ModelSource.KAGGLE, HANDLE),
}


def look(
    source: ModelSource, download_path: str = "", root: Path | None = None, revision: str = ""
) -> Checkpoint:
    place = REQUESTS[source].model_path
    request = ModelRequest("tiny", source, place, revision, download_path)
    return open_checkpoint(request, Policy(roots=None if root is None else (root,)))


def escaped(folder: Path) -> list[Path]:
    """What was written beside a folder of caches, or in it under a name that leads elsewhere."""
    own = {"cache", "home", "config", "token", "root", "secret"}
    beside = [path for path in folder.iterdir() if path.name not in own]
    return [*beside, *folder.rglob("*escape*")]


# Names


def test_names_that_lead_out_are_not_listed_by_the_hugging_face_hub(
    hub: Hub, tmp_path: Path
) -> None:
    commits = {"0" * 40: FILES | dict.fromkeys(NAMES, FILES["config.json"])}
    hub.repos[ID] = huggingface_hub.Repo(ID, commits=commits, refs={"main": "0" * 40})
    checkpoint = look(ModelSource.HUGGINGFACE)
    assert checkpoint.repository.files.keys() == FILES.keys()
    assert contents(fetch(checkpoint)) == FILES
    assert escaped(tmp_path) == []


def test_names_that_lead_out_are_not_listed_by_kaggle(kaggle: Kaggle, tmp_path: Path) -> None:
    kaggle.push(STORED, FILES | dict.fromkeys(NAMES, FILES["config.json"]))
    checkpoint = look(ModelSource.KAGGLE)
    assert checkpoint.repository.revision == "2"
    assert checkpoint.repository.files.keys() == FILES.keys()
    assert contents(fetch(checkpoint)) == FILES
    assert escaped(tmp_path) == []


@pytest.mark.parametrize("name", ["../escape.safetensors", "/escape.safetensors", "\ud800"])
def test_an_index_that_leads_out_is_corrupt(hub: Hub, name: str, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.repos[ID] = huggingface_hub.Repo(ID, commits={}, refs={"main": "0" * 40})
    shard = FILES["model-00001-of-00002.safetensors"]
    hub.repos[ID].commits["0" * 40] = FILES | {INDEX: index, name: shard}
    assert refusal(lambda: look(ModelSource.HUGGINGFACE)).reason is Reason.CHECKPOINT_CORRUPT
    assert escaped(tmp_path) == []


@pytest.mark.parametrize("commit", ["../../../escape", "/escape", "..", "main", "0" * 39, "A" * 40])
def test_a_commit_that_is_none_names_no_folder(hub: Hub, commit: str, tmp_path: Path) -> None:
    hub.repos[ID] = huggingface_hub.Repo(ID, commits={commit: FILES}, refs={"main": commit})
    assert refusal(lambda: look(ModelSource.HUGGINGFACE)).reason is Reason.SOURCE_UNAVAILABLE
    assert escaped(tmp_path) == []


REVISIONS = [
    "../main",
    "a/../../main",
    "/main",
    "..",
    "a\0",
    "a\nb",
    "main?x=1",
    "main#",
    "a b",
    "%2e",
]


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_revision_that_leads_elsewhere_is_not_asked_for(hub: Hub, revision: str) -> None:
    hub.push(ID, FILES)
    error = refusal(lambda: look(ModelSource.HUGGINGFACE, revision=revision))
    assert error.reason is Reason.CHECKPOINT_NOT_FOUND
    assert hub.log == []


@pytest.mark.parametrize("revision", ["../1", "1/../2", "-1", "1e3", "\u0661", "9" * 30])
def test_a_version_that_is_no_number_is_not_asked_for(kaggle: Kaggle, revision: str) -> None:
    error = refusal(lambda: look(ModelSource.KAGGLE, revision=revision))
    assert error.reason is Reason.INVALID_REQUEST
    assert kaggle.log == []


PLACES = [
    (ModelSource.HUGGINGFACE, "google/../org/tiny", Reason.MODEL_PATH_REQUIRED),
    (ModelSource.HUGGINGFACE, "google/tiny/../../org", Reason.MODEL_PATH_REQUIRED),
    (ModelSource.HUGGINGFACE, "google/tiny\n", Reason.MODEL_PATH_REQUIRED),
    (ModelSource.HUGGINGFACE, "google/tiny@main", Reason.MODEL_PATH_REQUIRED),
    (ModelSource.HUGGINGFACE, "google/..", Reason.CHECKPOINT_NOT_FOUND),
    (ModelSource.HUGGINGFACE, "../google", Reason.SOURCE_NOT_ALLOWED),
    (ModelSource.HUGGINGFACE, "googles/tiny", Reason.SOURCE_NOT_ALLOWED),
    (ModelSource.HUGGINGFACE, "Google/tiny", Reason.SOURCE_NOT_ALLOWED),
    (ModelSource.KAGGLE, "google/../transformers/tiny", Reason.MODEL_PATH_REQUIRED),
    (ModelSource.KAGGLE, "org/model/transformers/tiny", Reason.SOURCE_NOT_ALLOWED),
    (ModelSource.GCS, "gs://google/a\0b", Reason.MODEL_PATH_REQUIRED),
    (ModelSource.GCS, "gs://google/a\x1bb", Reason.MODEL_PATH_REQUIRED),
    (ModelSource.GCS, "gs://google/../other/models", Reason.MODEL_PATH_REQUIRED),
    (ModelSource.GCS, "gs://google@other/models", Reason.MODEL_PATH_REQUIRED),
    (ModelSource.GCS, "gs://other/google/models", Reason.SOURCE_NOT_ALLOWED),
    (ModelSource.MAXTEXT, "gs://other/google/models", Reason.SOURCE_NOT_ALLOWED),
    (ModelSource.MAXTEXT, "GS://google/models", Reason.CHECKPOINT_NOT_FOUND),
]


@pytest.mark.parametrize(("source", "path", "reason"), PLACES)
def test_what_is_allowed_is_no_way_to_the_rest(
    hub: Hub, source: ModelSource, path: str, reason: Reason, tmp_path: Path
) -> None:
    places = tuple(f"{name}:google/*" for name in ("huggingface", "kaggle", "gcs"))
    policy = Policy(roots=(tmp_path,), places=places)
    request = ModelRequest("tiny", source, path)
    assert refusal(lambda: open_checkpoint(request, policy), path).reason is reason
    assert hub.log == []


# What a hub sends


def test_a_header_that_is_too_long_is_not_asked_for(hub: Hub) -> None:
    content = (40 * MIB).to_bytes(8, "little") + bytes(40 * MIB)
    hub.push(ID, {"config.json": FILES["config.json"], "model.safetensors": content})
    errors: list[ModelError] = []

    def action() -> None:
        errors.append(refusal(lambda: look(ModelSource.HUGGINGFACE)))

    assert peak_bytes(action) < 64 * MIB  # the hub itself runs in this process
    assert errors[0].reason is Reason.CHECKPOINT_CORRUPT
    assert hub.sent("GET /cdn/*") == 8


def test_no_more_than_was_listed_is_written(
    kaggle: Kaggle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = kaggle_hub._Handler._list
    kaggle.push(STORED, FILES | {"merges.txt": bytes(8 * MIB)})

    def shorter(self: Any, files: dict[str, bytes], start: int) -> None:
        listed(self, files | {"merges.txt": b"short"}, start)

    monkeypatch.setattr(kaggle_hub._Handler, "_list", shorter)
    checkpoint, counts, advance = look(ModelSource.KAGGLE), list[int](), FileProgress.advance

    def counted(self: FileProgress, count: int) -> None:
        counts.append(count)
        advance(self, count)

    monkeypatch.setattr(FileProgress, "advance", counted)
    error = refusal(lambda: fetch(checkpoint))
    assert error.reason is Reason.SOURCE_UNAVAILABLE
    assert sum(count for count in counts if count > 0) < MIB  # of what arrived
    held = contents(tmp_path / "cache")
    assert all(len(held[name]) < MIB for name in held if "merges" in name)


# Download paths


SOURCES = [ModelSource.HUGGINGFACE, ModelSource.KAGGLE]
BELOW = {ModelSource.HUGGINGFACE: "", ModelSource.KAGGLE: f"models/{HANDLE}/1/"}


@pytest.fixture
def root(hub: Hub, kaggle: Kaggle, tmp_path: Path) -> Path:
    """A root, and a file beside it that nobody may read or write."""
    hub.push(ID, FILES)
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "victim").write_bytes(FILES["config.json"])
    return tmp_path / "root"


@pytest.mark.parametrize("source", SOURCES)
def test_a_download_path_is_filled_below_a_root(source: ModelSource, root: Path) -> None:
    folder = fetch(look(source, "here", root))
    assert folder.is_relative_to(root / "here")
    assert contents(folder).items() >= FILES.items()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("path", ["{root}/../secret", "../secret", "/", "link", "a/../../secret"])
def test_a_download_path_out_of_the_roots_is_refused(
    source: ModelSource, path: str, root: Path, hub: Hub, kaggle: Kaggle
) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    path = path.format(root=root)
    error = refusal(lambda: look(source, path, root), path)
    assert error.reason is Reason.SOURCE_NOT_ALLOWED
    assert hub.log == kaggle.log == []


PLANTED = ["config.json", "config.json.moorage.partial", ".cache", "moorage", "folder"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", PLANTED)
def test_a_link_in_a_download_path_is_not_followed_out_of_the_roots(
    source: ModelSource, name: str, root: Path, hub: Hub, kaggle: Kaggle
) -> None:
    planted, victim = root / "here" / BELOW[source] / name, root.parent / "secret" / "victim"
    planted.parent.mkdir(parents=True)
    planted.symlink_to(victim if "." in name[1:] else victim.parent)
    error = refusal(lambda: look(source, "here", root))
    assert error.reason is Reason.SOURCE_NOT_ALLOWED
    assert hub.log == kaggle.log == []
    assert contents(victim.parent) == {"victim": FILES["config.json"]}


@pytest.mark.parametrize("source", SOURCES)
def test_a_pipe_in_a_download_path_is_not_waited_for(source: ModelSource, root: Path) -> None:
    planted = root / "here" / BELOW[source] / "config.json"
    planted.parent.mkdir(parents=True)
    os.mkfifo(planted)
    assert refusal(lambda: look(source, "here", root)).reason is Reason.CHECKPOINT_CORRUPT


@pytest.mark.parametrize("name", ["../../secret/victim", "{victim}", "config.json"])
def test_a_record_that_somebody_planted_reads_nothing_outside(
    name: str, root: Path, hub: Hub
) -> None:
    commit, victim = hub.repos[ID].refs["main"], root.parent / "secret" / "victim"
    stat = victim.stat()
    file = {"size": stat.st_size, "verified_ns": stat.st_mtime_ns, "digest": ""}
    record = root / f"here/.cache/moorage/models--org--tiny/moorage/{commit}/files.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({name.format(victim=victim): file}))
    repository = look(ModelSource.HUGGINGFACE, "here", root, commit).repository
    assert repository.files == {name: len(content) for name, content in FILES.items()}
    assert repository.local is None


def test_a_record_that_is_a_pipe_or_endless_is_forgotten(root: Path, hub: Hub) -> None:
    commit = hub.repos[ID].refs["main"]
    record = root / f"here/.cache/moorage/models--org--tiny/moorage/{commit}/files.json"
    record.parent.mkdir(parents=True)
    record.touch()
    os.truncate(record, 1 << 30)
    assert peak_bytes(lambda: look(ModelSource.HUGGINGFACE, "here", root, commit)) < 80 * MIB
