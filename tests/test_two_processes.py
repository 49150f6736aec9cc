"""Two processes that share a mesh: each reads its own part of a checkpoint, and both score."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import mesh_process
from checkpoints import mesh_of, open_folder
from moorage_models.automodel import load

EACH = pytest.mark.parametrize(
    ("process", "placer"), [(0, "arena"), (0, "ring"), (1, "arena"), (1, "ring")]
)


class Run(NamedTuple):
    """What both processes found of a checkpoint, and the bytes of its tensors."""

    folder: Path
    nbytes: int
    found: list[dict[str, Any]]


@contextmanager
def reserved_address() -> Iterator[str]:
    """A free address that no one else is given meanwhile; gRPC, which shares ports, may use it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("model")
    nbytes = mesh_process.make(folder)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    logs = [folder / f"process-{process}.log" for process in range(2)]
    with reserved_address() as address, ExitStack() as stack:
        processes = []
        for process, log in enumerate(logs):
            command = [sys.executable, mesh_process.__file__, address, str(process), str(folder)]
            output = stack.enter_context(open(log, "w"))
            started = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            processes.append(stack.enter_context(started))
            stack.callback(started.kill)
        codes = [process.wait(90) for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    found = [json.loads((folder / f"found-{process}.json").read_text()) for process in range(2)]
    return Run(folder, nbytes, found)


@EACH
def test_a_process_reads_its_share(run: Run, process: int, placer: str) -> None:
    found = run.found[process][placer]
    assert found["share"] < 0.501 * run.nbytes
    assert found["share"] <= found["read"] <= 1.02 * found["share"]


@EACH
def test_its_devices_hold_what_the_files_say(run: Run, process: int, placer: str) -> None:
    assert run.found[process][placer]["wrong"] == []


def test_both_score_as_one_process_does(run: Run) -> None:
    mesh = mesh_of(4, 2)
    params, _ = load(open_folder(run.folder), mesh)
    expected = mesh_process.scores(run.folder, mesh, params)
    for process in range(2):
        scores = np.load(run.folder / f"scores-{process}.npy")
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
