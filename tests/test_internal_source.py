"""INTERNAL: which directories may be read, how they are told apart, and copies of them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from checkpoints import GOLDEN
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_models.sources import ModelRequest, ModelSource, Policy, Repository, open_repository

WEIGHTS = "model.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a checkpoint in it, and a checkpoint beside it."""
    for folder in ("root", "secret"):
        shutil.copytree(GOLDEN / "llama3", tmp_path / folder / "model")
    return tmp_path / "root"


def opened(path: Path | str, root: Path | None, download_path: Path | str = "") -> Repository:
    request = ModelRequest(
        "tiny", ModelSource.INTERNAL, str(path), download_path=str(download_path)
    )
    return open_repository(request, Policy(roots=None if root is None else (root,)))


def refusal(path: Path | str, root: Path | None, download_path: Path | str = "") -> ModelError:
    """The refusal, which tells of no path that the caller did not give."""
    with pytest.raises(ModelError) as caught:
        opened(path, root, download_path)
    message = caught.value.message
    for given in (str(path), str(download_path)):
        message = message.replace(given, "") if given else message
    assert "/tmp" not in message
    assert "secret" not in message
    return caught.value


def test_a_directory_under_a_root_is_opened(root: Path) -> None:
    repository = opened(root / "model", root)
    assert set(repository.files) == {"config.json", "golden.npz", WEIGHTS}
    assert repository.files[WEIGHTS] == os.path.getsize(root / "model" / WEIGHTS)
    whole = (root / "model" / WEIGHTS).read_bytes()
    assert repository.read(WEIGHTS, 8, 100) == whole[8:100]
    assert repository.label == str(root / "model")
    assert repository.fetch([WEIGHTS], LoadMonitor()) == root / "model"


def test_a_relative_path_is_looked_up_under_each_root(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent / "secret")  # where the server happens to run
    roots = (root.parent / "empty", root)
    request = ModelRequest("tiny", ModelSource.INTERNAL, "model")
    repository = open_repository(request, Policy(roots=roots))
    assert repository.fetch([], LoadMonitor()) == root / "model"
    assert repository.label == "model"


def test_the_root_itself_may_be_the_checkpoint(root: Path) -> None:
    assert WEIGHTS in opened(root / "model", root / "model").files
    assert WEIGHTS in opened(".", root / "model").files


def test_without_roots_everything_may_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert WEIGHTS in opened(root.parent / "secret" / "model", None).files
    monkeypatch.chdir(root)
    assert WEIGHTS in opened("model", None).files


def test_a_root_may_be_a_link(root: Path) -> None:
    (root.parent / "mount").symlink_to(root)
    assert WEIGHTS in opened("model", root.parent / "mount").files
    assert WEIGHTS in opened(root / "model", root.parent / "mount").files


@pytest.mark.parametrize(
    "path",
    [
        "{tmp}/secret/model",
        "{tmp}",
        "{tmp}/root/../secret/model",
        "../secret/model",
        "model/../../secret/model",
        "{tmp}/rooted",
        "/",
        "link",
        "{tmp}/root/link",
        "link/../model",
        "{tmp}/nowhere",
        "../nowhere",
    ],
)
def test_what_is_outside_the_roots_is_refused(path: str, root: Path) -> None:
    """By where it really is; whether it is there does not show."""
    shutil.copytree(root / "model", root.parent / "rooted")
    (root / "link").symlink_to(root.parent / "secret" / "model")
    error = refusal(path.format(tmp=root.parent), root)
    assert error.reason is Reason.SOURCE_NOT_ALLOWED
    assert "--root" in error.message


def test_a_file_that_links_out_of_the_root_is_refused(root: Path) -> None:
    (root / "model" / WEIGHTS).unlink()
    (root / "model" / WEIGHTS).symlink_to(root.parent / "secret" / "model" / WEIGHTS)
    error = refusal("model", root)
    assert error.reason is Reason.SOURCE_NOT_ALLOWED
    assert WEIGHTS in error.message


def test_a_file_that_links_within_the_root_is_read(root: Path) -> None:
    os.rename(root / "model" / WEIGHTS, root / "blob")
    (root / "model" / WEIGHTS).symlink_to("../blob")
    assert opened("model", root).files[WEIGHTS] == os.path.getsize(root / "blob")


def test_no_root_at_all_allows_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    for path in ("model", str(root / "model")):
        with pytest.raises(ModelError, match="SOURCE_NOT_ALLOWED"):
            open_repository(ModelRequest("tiny", ModelSource.INTERNAL, path), Policy(roots=()))


def test_a_source_that_is_not_served_is_refused(root: Path) -> None:
    request = ModelRequest("tiny", ModelSource.INTERNAL, str(root / "model"))
    with pytest.raises(ModelError, match=r"SOURCE_NOT_ALLOWED.*HUGGINGFACE"):
        open_repository(request, Policy(sources=(ModelSource.HUGGINGFACE,)))


@pytest.mark.parametrize("path", ["gone", "model/config.json", "model/gone/deeper"])
def test_what_is_no_directory_is_not_found(path: str, root: Path) -> None:
    assert refusal(path, root).reason is Reason.CHECKPOINT_NOT_FOUND


def test_a_path_is_required(root: Path) -> None:
    error = refusal("", root)
    assert error.reason is Reason.MODEL_PATH_REQUIRED
    assert "model_path" in error.message


@pytest.mark.parametrize("path", ["model\0", "x" * 5000, "loop", "x/" * 3000])
def test_a_path_that_cannot_be_is_refused(path: str, root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    assert refusal(path, root).reason in (Reason.INVALID_REQUEST, Reason.CHECKPOINT_NOT_FOUND)


def test_files_are_copied_to_the_download_path(root: Path) -> None:
    monitor, target = LoadMonitor(), root / "copies" / "here"
    repository = opened("model", root, download_path=target)
    assert not target.exists()
    assert repository.fetch([WEIGHTS], monitor) == target
    assert set(os.listdir(target)) == {WEIGHTS, "config.json"}  # usable by other tools
    for name in os.listdir(target):
        assert (target / name).read_bytes() == (root / "model" / name).read_bytes()
    size = sum(repository.files[name] for name in (WEIGHTS, "config.json"))
    stage = monitor.stages()["fetch"]
    assert (stage.done, stage.total) == (size, size)


def test_an_older_copy_is_replaced(root: Path) -> None:
    (root / "copies").mkdir()
    (root / "copies" / WEIGHTS).write_bytes(b"old")
    opened("model", root, download_path="copies").fetch([WEIGHTS], LoadMonitor())
    assert (root / "copies" / WEIGHTS).read_bytes() == (root / "model" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("target", ["{tmp}/elsewhere", "../elsewhere"])
def test_copies_stay_under_the_roots(target: str, root: Path) -> None:
    error = refusal("model", root, target.format(tmp=root.parent))
    assert error.reason is Reason.SOURCE_NOT_ALLOWED


def test_a_cancelled_copy_leaves_nothing(root: Path) -> None:
    monitor, repository = LoadMonitor(), opened("model", root, download_path="copies")
    monitor.cancel()
    with pytest.raises(ModelError, match="LOAD_CANCELLED"):
        repository.fetch([WEIGHTS], monitor)
    assert os.listdir(root / "copies") == []


def copy_failure(root: Path) -> ModelError:
    repository = opened("model", root, download_path="copies")
    with pytest.raises(ModelError) as caught:
        repository.fetch([WEIGHTS], LoadMonitor())
    assert str(root) not in caught.value.message
    return caught.value


def test_a_full_disk_says_so_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root))

    monkeypatch.setattr(os, "replace", full)
    assert copy_failure(root).reason is Reason.DISK_FULL
    assert os.listdir(root / "copies") == []


def test_a_copy_that_fails_otherwise_is_no_full_disk(root: Path) -> None:
    (root / "copies").write_text("a file where the folder should be")
    assert copy_failure(root).reason is Reason.SOURCE_UNAVAILABLE


def test_the_revision_changes_with_the_files(root: Path) -> None:
    file, seen = root / "model" / WEIGHTS, [opened("model", root).revision]
    assert opened(root / "model", root).revision == seen[0]
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    seen.append(opened("model", root).revision)
    with open(file, "ab") as writer:
        writer.write(b"x")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    seen.append(opened("model", root).revision)
    os.rename(file, file.with_name("other.safetensors"))
    seen.append(opened("model", root).revision)
    file.with_name("more.safetensors").write_bytes(b"")
    seen.append(opened("model", root).revision)
    assert len(set(seen)) == 5


def test_the_key_is_the_place_however_it_was_named(root: Path) -> None:
    (root / "alias").symlink_to(root / "model")
    keys = {opened(path, root).key for path in ("model", "alias", "./model/", root / "model")}
    assert len(keys) == 1
