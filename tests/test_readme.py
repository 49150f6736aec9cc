"""The README's code blocks, run in order against a server started by its own command."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import real_models
from server_process import running_server

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, text in BLOCKS
    if language == "sh"
    for line in text.splitlines()
]


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return real_models.make("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def address(model_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    serve = next(c for c in COMMANDS if c[:2] == ["moorage", "serve"])
    assert serve[-2:] == ["--root", "~/.cache/moorage/models"]
    mesh = serve[serve.index("--mesh") + 1]
    with running_server(model_folder.parent, mesh=mesh) as address:
        yield address


def test_python_blocks_run(
    address: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOORAGE_SERVER", address)
    names: dict[str, object] = {"folder": str(model_folder)}
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "README.md", "exec"), names)
    scores = names["scores"]
    assert [len(row) for row in scores.logprobs] == [6, 2]
    assert scores.logprobs[0][5] == pytest.approx(-0.2606, abs=1e-3)  # " Paris"
    assert names["logits"].shape == (1, 3, 49152)


def test_commands_run(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOORAGE_SERVER", address)
    own = [c[1:] for c in COMMANDS if c[0] == "moorage" and c[1] != "serve"]
    mine = [command for command in own if "--watch" not in command]  # which has no end
    assert (len(own), len(mine)) == (5, 4)
    for command in mine:
        done = subprocess.run([sys.executable, "-m", "moorage", *command], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command[0] == "make":
            assert f"\n{command[1]}:" in makefile
