"""What the tests of every hub do: a checkpoint in shards, its fetch, and one that is cancelled."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.numpy import save

from checkpoints import GOLDEN, stored_tensors
from moorage_models.checkpoint import Checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor


def sharded(count: int) -> dict[str, bytes]:
    """The files of a golden checkpoint, its tensors spread over `count` files."""
    tensors = stored_tensors(GOLDEN / "qwen3_tied")
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    shards = {shard: sorted(tensors)[i::count] for i, shard in enumerate(names)}
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    return {
        **{shard: save({n: tensors[n] for n in held}) for shard, held in shards.items()},
        "model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": (GOLDEN / "qwen3_tied" / "config.json").read_bytes(),
    }


def fetch(checkpoint: Checkpoint, monitor: LoadMonitor | None = None) -> Path:
    return checkpoint.repository.fetch(checkpoint.plan.files, monitor or LoadMonitor())


def contents(folder: Path) -> dict[str, bytes]:
    paths = [p for p in folder.rglob("*") if p.is_file()]
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):  # another download may take its half away meanwhile
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def seconds_to_cancel(checkpoint: Checkpoint) -> float:
    """Cancels a fetch after 0.3 seconds; returns when it ended, which must be by the cancel."""
    monitor = LoadMonitor()
    threading.Timer(0.3, monitor.cancel).start()
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        fetch(checkpoint, monitor)
    assert caught.value.reason is Reason.LOAD_CANCELLED
    return time.monotonic() - start


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30  # threads of other tests end by timeouts of their own
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def no_thread_fetches() -> bool:
    return not any(t.name.startswith(("fetch", "stream")) for t in threading.enumerate())
