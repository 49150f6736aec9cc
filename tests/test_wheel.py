"""The client alone, from a wheel, beside each protobuf that a trainer may have."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import GOLDEN
from server_process import ServerProcess, server_process

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
SCORE = """
import sys
from importlib.metadata import version
import moorage
with moorage.connect(sys.argv[1]) as client:
    model = client.load("llama3", "internal", "llama3")
    print(version("protobuf"), len(model.forward([[2, 3, 4]]).logprobs[0]), "jax" in sys.modules)
"""


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(GOLDEN, tmp_path_factory.mktemp("server"), mesh="tp=1") as running:
        yield running


@pytest.mark.parametrize("wanted", ["==6.31.1", "==6.33.0", ">=7"])
def test_the_client_alone(wheel: Path, server: ServerProcess, tmp_path: Path, wanted: str) -> None:
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, f"protobuf{wanted}")
    found, tokens, has_jax = run(python, "-c", SCORE, server.address).split()
    assert found.startswith(wanted.lstrip("=>"))
    assert (tokens, has_jax) == ("3", "False")
