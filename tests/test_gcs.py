"""The GCS source, against fake-gcs-server: the client is Google's own."""

from __future__ import annotations

import gzip
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google.auth
import jax
import numpy as np
import pytest
from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError

import hubs
from downloads import contents, fetch, no_thread_fetches, seconds_to_cancel, sharded, until
from gcs import Gcs, fake_gcs_server
from loopback import Fault
from moorage_models.automodel import AutoModel, load
from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_models.sources import ModelRequest, ModelSource, Policy, gcs_prefix, remote
from moorage_models.sources import gcs as source

STRAYS = {"README.md": b"# A model", "pytorch_model.bin": b"pickle" * 100, "sub/": b""}
TOKENIZER = {"tokenizer.json": b'{"version": "1.0"}', "vocab.json": b""}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with fake_gcs_server() as url:
        yield url


@pytest.fixture
def gcs(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gcs]:
    with hubs.bucket(monkeypatch, tmp_path, server) as gcs:
        yield gcs


_numbers = itertools.count()


@pytest.fixture
def bucket() -> str:
    """A bucket of the test's own."""
    return f"bucket-{next(_numbers)}"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A checkpoint in two files of several pieces each."""
    return {**sharded(2), **TOKENIZER}


@pytest.fixture
def pushed(gcs: Gcs, bucket: str, files: dict[str, bytes]) -> str:
    """The checkpoint in the bucket, beside others' objects; its path."""
    push(gcs, bucket, files | STRAYS)
    gcs.put(bucket, {"models/one": b"file", "models/one-more/config.json": b"{}", "a": b""})
    return f"gs://{bucket}/models/one"


def push(gcs: Gcs, bucket: str, files: dict[str, bytes], prefix: str = "models/one") -> None:
    gcs.put(bucket, {f"{prefix}/{name}": content for name, content in files.items()})


def open_it(path: str, revision: str = "", policy: Policy | None = None) -> Checkpoint:
    request = ModelRequest("tiny", ModelSource.GCS, path, revision, download_path="/nowhere")
    return open_checkpoint(request, policy)


def refusal(path: str, *args: Any) -> ModelError:
    """The error with which opening and fetching ends."""
    with pytest.raises(ModelError) as caught:
        fetch(open_it(path, *args))
    return caught.value


WEIGHTS = "GET *.safetensors"


# What a load reads and brings


def test_opening_reads_metadata_and_headers_and_a_fetch_the_rest(
    gcs: Gcs, bucket: str, pushed: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    checkpoint = open_it(pushed)
    headers = [int.from_bytes(files[n][:8], "little") + 8 for n in files if "-of-" in n]
    assert gcs.sent(WEIGHTS) == sum(headers)
    assert gcs.lines("LIST*") == [f"LIST {bucket}"]
    assert not (tmp_path / "cache").exists()
    gcs.log.clear()
    folder = fetch(checkpoint)
    home = tmp_path / "cache" / "gcs" / bucket / "models--one"
    assert folder == home / checkpoint.repository.revision
    assert contents(folder) == files
    assert gcs.sent() == sum(map(len, files.values()))
    assert all("generation=" in r.query and "ifGenerationMatch=" in r.query for r in gcs.log)


def test_auto_model_has_the_weights_of_the_same_files_on_disk(
    gcs: Gcs, bucket: str, golden: Path
) -> None:
    held = {p.name: p.read_bytes() for p in (golden / "qwen3_tied").iterdir()}
    push(gcs, bucket, held)
    mesh = jax.make_mesh((8,), ("fsdp",))
    model, folder = AutoModel.from_pretrained(
        "qwen3-0.6b", mesh, model_path=f"gs://{bucket}/models/one/", model_source=ModelSource.GCS
    )
    assert model is not None
    assert contents(Path(folder)).keys() == {"config.json", "model.safetensors"}
    request = ModelRequest("tiny", ModelSource.INTERNAL, str(golden / "qwen3_tied"))
    params, _ = load(open_it(f"gs://{bucket}/models/one"), mesh)
    expected, _ = load(open_checkpoint(request), mesh)
    assert params.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(np.asarray(params[key]), np.asarray(value))


MALFORMED = """bucket/prefix gs:// gs://b gs://bucket gs://bucket/ /models gs:///prefix s3://bucket/p
    gs://bucket/../p gs://bucket/a//b gs://bucket/a/. gs://../bucket"""


@pytest.mark.parametrize("path", ["", *MALFORMED.split()])
def test_a_path_that_names_no_folder_of_a_bucket_is_refused(gcs: Gcs, path: str) -> None:
    with pytest.raises(ModelError, match="gs://bucket/prefix") as caught:
        open_checkpoint(ModelRequest("tiny", ModelSource.GCS, path))
    assert caught.value.reason is Reason.MODEL_PATH_REQUIRED
    assert gcs.log == []


@pytest.mark.parametrize("name", ["models/on", "models/one/config.json", "models/empty"])
def test_a_folder_without_objects_is_not_found(
    gcs: Gcs, pushed: str, bucket: str, name: str
) -> None:
    gcs.put(bucket, {"models/empty/": b"", "models/empty/../../x": b""})
    error = refusal(f"gs://{bucket}/{name}")
    assert (error.reason, "check the path" in error.message) == (Reason.CHECKPOINT_NOT_FOUND, True)


def test_a_bucket_that_is_not_there_is_not_found(gcs: Gcs) -> None:
    error = refusal("gs://no-such-bucket/models")
    assert error.reason is Reason.CHECKPOINT_NOT_FOUND
    assert "no such bucket" in error.message


def test_a_folder_with_too_many_objects_is_refused(
    gcs: Gcs, pushed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs_prefix, "_MAX_OBJECTS", 8)
    assert refusal(pushed).reason is Reason.INVALID_REQUEST
    monkeypatch.setattr(gcs_prefix, "_MAX_OBJECTS", 9)
    fetch(open_it(pushed))


def test_a_listing_of_several_pages_is_read_to_its_end(
    gcs: Gcs, bucket: str, pushed: str, files: dict[str, bytes]
) -> None:
    gcs.page = 2
    assert contents(fetch(open_it(pushed))) == files
    assert open_it(pushed).repository.files.keys() == files.keys() | STRAYS.keys() - {"sub/"}
    assert ["pageToken" in r.query for r in gcs.log if r.line.startswith("LIST")][:3] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md"])
def test_an_object_that_is_stored_compressed_is_refused_if_it_is_needed(
    gcs: Gcs, bucket: str, pushed: str, files: dict[str, bytes], name: str
) -> None:
    plain = (files | STRAYS)[name]
    gcs.put(bucket, {f"models/one/{name}": gzip.compress(plain)}, encoding="gzip")
    if name in STRAYS:
        assert contents(fetch(open_it(pushed))) == files
        return
    error = refusal(pushed)
    assert error.reason is Reason.CHECKPOINT_UNSUPPORTED
    assert f"{name} is stored with Content-Encoding gzip: upload it again" in error.message
    push(gcs, bucket, {name: plain})
    assert contents(fetch(open_it(pushed))) == files


def test_the_policy_says_what_may_be_read(gcs: Gcs, bucket: str, pushed: str) -> None:
    other = Policy(places=("gcs:other/*", f"huggingface:{bucket}/*"))
    assert refusal(pushed, "", other).reason is Reason.SOURCE_NOT_ALLOWED
    request = ModelRequest("tiny", ModelSource.MAXTEXT, pushed)
    with pytest.raises(ModelError, match=f"gcs:{bucket}/models/one"):
        open_checkpoint(request, other)
    assert gcs.log == []
    fetch(open_it(pushed, "", Policy(places=(f"gcs:{bucket}/models/*",))))


def test_a_maxtext_checkpoint_lies_in_a_bucket_or_in_a_directory(
    gcs: Gcs, pushed: str, files: dict[str, bytes], golden: Path
) -> None:
    request = ModelRequest("tiny", ModelSource.MAXTEXT, pushed)
    assert contents(fetch(open_checkpoint(request))) == files
    request = ModelRequest("tiny", ModelSource.MAXTEXT, str(golden / "qwen3_tied"))
    assert fetch(open_checkpoint(request)) == golden / "qwen3_tied"


# Revisions, warm and offline


def test_a_warm_revision_costs_no_request_and_a_warm_path_one(
    gcs: Gcs, bucket: str, pushed: str, files: dict[str, bytes]
) -> None:
    revision = open_it(pushed).repository.revision
    cold = fetch(open_it(pushed))
    gcs.log.clear()
    monitor = LoadMonitor()
    assert fetch(open_it(pushed, revision), monitor) == cold
    assert gcs.log == []
    assert monitor.stages()["fetch"].done == sum(map(len, files.values()))
    assert fetch(open_it(pushed)) == cold
    assert gcs.lines() == [f"LIST {bucket}"]


def test_a_warm_revision_brings_what_it_lacks(
    gcs: Gcs, bucket: str, pushed: str, files: dict[str, bytes]
) -> None:
    repository = open_it(pushed).repository
    repository.fetch([], LoadMonitor())
    warm = open_it(pushed, repository.revision)
    gcs.log.clear()
    assert contents(fetch(warm)) == files
    assert set(gcs.lines("LIST*")) == {f"LIST {bucket}"}


def test_a_revision_whose_objects_have_changed_is_told(
    gcs: Gcs, bucket: str, pushed: str, files: dict[str, bytes]
) -> None:
    old = open_it(pushed)
    push(gcs, bucket, {"config.json": files["config.json"]})
    new = open_it(pushed).repository.revision
    assert new != old.repository.revision
    error = refusal(pushed, old.repository.revision)
    assert error.reason is Reason.CHECKPOINT_NOT_FOUND
    assert "have changed" in error.message
    assert new in error.message
    assert contents(fetch(open_it(pushed, new))) == files
    assert refusal(pushed, "main").reason is Reason.CHECKPOINT_NOT_FOUND


def refuse_connections(gcs: Gcs) -> None:
    gcs.__exit__()


def answer_503(gcs: Gcs) -> None:
    gcs.faults.append(Fault("*", status=503))


@pytest.mark.parametrize("outage", [refuse_connections, answer_503])
def test_without_the_bucket_a_path_is_what_it_was(
    gcs: Gcs, bucket: str, pushed: str, files: dict[str, bytes], outage: Callable[[Gcs], None]
) -> None:
    push(gcs, bucket, files, "models--one")  # its files go to the same folder
    cold = fetch(open_it(pushed))
    outage(gcs)
    gcs.log.clear()
    assert fetch(open_it(pushed)) == cold
    assert len(gcs.log) <= 1  # it is not waited for
    assert contents(cold) == files
    error = refusal(f"gs://{bucket}/models--one")
    assert error.reason is Reason.SOURCE_UNAVAILABLE
    assert "try later" in error.message


# Objects that change, broken and damaged downloads, refusals


@pytest.mark.parametrize("how", ["overwritten", "deleted", "generation"])
@pytest.mark.parametrize("when", ["read", "fetch"])
def test_an_object_that_changes_under_way_is_corrupt(
    gcs: Gcs, bucket: str, pushed: str, files: dict[str, bytes], how: str, when: str
) -> None:
    name = "model-00002-of-00002.safetensors"
    repository = open_it(pushed).repository
    if how == "overwritten":
        push(gcs, bucket, {name: files[name][::-1]})
    elif how == "deleted":
        gcs.delete(bucket, f"models/one/{name}")
    else:
        gcs.faults.append(Fault(f"GET *{name}", generation="5"))
    ways = {
        "read": lambda: repository.read(name, 50_000, 50_010),
        "fetch": lambda: repository.fetch([name], LoadMonitor()),
    }
    with pytest.raises(ModelError, match="changed while it was read: load again") as caught:
        ways[when]()
    assert caught.value.reason is Reason.CHECKPOINT_CORRUPT
    assert name in caught.value.message
    gcs.faults.clear()
    push(gcs, bucket, files)
    assert contents(fetch(open_it(pushed))) == files


def test_a_bucket_that_refuses_a_request_is_told(gcs: Gcs, pushed: str) -> None:
    gcs.faults.append(Fault("LIST *", status=400))
    error = refusal(pushed)
    assert error.reason is Reason.CHECKPOINT_NOT_FOUND
    assert "check the bucket" in error.message


def test_a_download_goes_on_where_an_earlier_one_ended(
    gcs: Gcs, pushed: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    checkpoint = open_it(pushed)
    name = "model-00001-of-00002.safetensors"
    partial = tmp_path / "cache/gcs" / checkpoint.repository.key.replace("/models/", "/models--")
    partial = partial / checkpoint.repository.revision / f"{name}.partial"
    orphan = partial.parent.parent / "0123456789abcdef" / partial.name
    for path in (partial, orphan):
        path.parent.mkdir(parents=True)
        path.write_bytes(files[name][:30_001])
    gcs.log.clear()
    monitor = Counts()
    assert contents(fetch(checkpoint, monitor)) == files
    assert 30_001 in monitor.counts
    assert gcs.sent(f"GET *{name}") == len(files[name]) - 30_001
    assert not orphan.exists()


def test_a_piece_that_fails_is_asked_for_again_before_the_file_is(
    gcs: Gcs, pushed: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_PIECE_PAUSES", (0.0,))
    monkeypatch.setattr(remote, "PAUSES", ())
    checkpoint = open_it(pushed)
    gcs.faults.append(Fault(WEIGHTS, cut=5000, times=1))
    gcs.log.clear()
    monitor = Counts()
    assert contents(fetch(checkpoint, monitor)) == files
    assert gcs.sent() == sum(map(len, files.values())) + 5000
    assert sum(monitor.counts) == sum(map(len, files.values()))
    assert sum(count for count in monitor.counts if count < 0) == -5000


# Credentials


@pytest.mark.parametrize(
    ("error", "key", "reason", "says"),
    [
        (DefaultCredentialsError("x"), "", None, ""),
        (DefaultCredentialsError("x"), "/no/key", Reason.SOURCE_AUTH_REQUIRED, "names no cred"),
        (RefreshError("x"), "", Reason.SOURCE_AUTH_REQUIRED, "cannot be renewed"),
        (TransportError("x"), "", Reason.SOURCE_UNAVAILABLE, "try later"),
    ],
)
def test_without_credentials_the_bucket_is_asked_as_a_public_one(
    gcs: Gcs,
    pushed: str,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    key: str,
    reason: Reason | None,
    says: str,
) -> None:
    def default(**_: Any) -> None:
        raise error

    monkeypatch.setattr(google.auth, "default", default)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", gcs.url)
    if key:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", key)
    if reason is None:
        fetch(open_it(pushed))
        return
    refused = refusal(pushed)
    assert refused.reason is reason
    assert says in refused.message


# Progress and cancellation


class Counts(LoadMonitor):
    """A monitor that keeps what it is told, before it limits it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def advance(self, stage: str, count: int) -> None:
        super().advance(stage, count)
        self.counts.append(count)


def test_progress_adds_up_after_faults(gcs: Gcs, pushed: str, files: dict[str, bytes]) -> None:
    checkpoint = open_it(pushed)
    gcs.faults += [Fault(WEIGHTS, cut=5000, times=3), Fault(WEIGHTS, length=5000, times=3)]
    monitor = Counts()
    fetch(checkpoint, monitor)
    total = sum(map(len, files.values()))
    assert sum(monitor.counts) == total
    assert max(monitor.counts) <= 1 << 20
    stage = monitor.stages()["fetch"]
    assert (stage.done, stage.total) == (total, total)


def test_a_cancelled_load_ends_at_once_and_the_next_is_whole(
    gcs: Gcs, pushed: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_PIECE_PAUSES", (0.0,))
    checkpoint = open_it(pushed)
    gcs.faults.append(Fault(WEIGHTS, stall=5000))
    start = time.monotonic()
    assert 0.3 <= seconds_to_cancel(checkpoint) < 1.3
    gcs.faults.clear()
    assert contents(fetch(checkpoint)) == files  # while threads of the cancelled one still wait
    assert time.monotonic() - start < 4  # but not for the timeout of what stalls
    gcs.log.clear()
    gcs.closed.set()  # now the threads end, and ask for nothing again
    until(no_thread_fetches)
    assert gcs.log == []


def test_a_cancel_ends_a_listing_that_stalls(gcs: Gcs, pushed: str) -> None:
    repository = open_it(pushed).repository
    repository.fetch([], LoadMonitor())
    warm = open_it(pushed, repository.revision)  # which lists only to fetch what is lacking
    gcs.faults.append(Fault("LIST *", stall=0))
    assert 0.3 <= seconds_to_cancel(warm) < 1.3
    gcs.closed.set()
    until(no_thread_fetches)
