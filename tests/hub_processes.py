"""Processes that open a checkpoint on a hub, wait, and fetch it: for tests that start or kill them.

usage: hub_processes.py COUNT SOURCE MODEL_PATH

Each prints `open`, waits until the input ends, fetches, and prints the digests of its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

from huggingface_hub import constants

from moorage_models.checkpoint import open_checkpoint
from moorage_models.monitor import LoadMonitor
from moorage_models.sources import ModelRequest, ModelSource, gcs, kaggle


def main(count: int, source: str, model_path: str) -> None:
    # Small, so that what is half fetched is on the disk.
    constants.DOWNLOAD_CHUNK_SIZE = kaggle._PIECE_BYTES = gcs._PIECE_BYTES = 1 << 12
    for _ in range(count - 1):  # forked: what takes long is to import
        if os.fork() == 0:
            break
    checkpoint = open_checkpoint(ModelRequest("tiny", ModelSource(source), model_path))
    say("open")
    sys.stdin.read()
    folder = checkpoint.repository.fetch(checkpoint.plan.files, LoadMonitor())
    files = [path for path in folder.iterdir() if path.is_file()]
    say(json.dumps({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}))


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one piece, beside others' lines


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
    os._exit(0)  # at once: to take apart what forks share takes long
