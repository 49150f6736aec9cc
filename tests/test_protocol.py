"""The stubs, the proto file and the layers: what other tools have to say about them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROTO = "moorage/v1/moorage.proto"
BIN = Path(sys.executable).parent


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_stubs_are_those_of_the_proto(tmp_path):
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    done = run(sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *outputs, PROTO)
    assert done.returncode == 0, done.stderr
    fresh = {path.name: path.read_text() for path in (tmp_path / "moorage" / "v1").iterdir()}
    checked_in = {
        path.name: path.read_text() for path in (ROOT / "client/moorage/v1").glob("*_pb2*.py*")
    }
    assert fresh.keys() == {"moorage_pb2.py", "moorage_pb2.pyi", "moorage_pb2_grpc.py"}
    assert checked_in == fresh


@pytest.mark.parametrize("arguments", [["lint"], ["format", "--diff", "--exit-code"], ["build"]])
def test_buf_is_content(arguments):
    done = run(BIN / "buf", *arguments)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_layers_import_only_what_they_may():
    done = run(BIN / "lint-imports", "--no-cache")
    assert done.returncode == 0, done.stdout
    kept, broken = re.search(r"(\d+) kept, (\d+) broken", done.stdout).groups()
    assert (int(kept) >= 4, broken) == (True, "0")


def test_the_client_needs_neither_jax_nor_the_server():
    program = (
        "import sys, moorage, moorage.aio, moorage.cli\n"
        "roots = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(roots & {'jax', 'jaxlib', 'flax', 'moorage_models', 'moorage_server'}))"
    )
    assert run(sys.executable, "-c", program).stdout == "[]\n"
