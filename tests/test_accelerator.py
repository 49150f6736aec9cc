"""One server an accelerator, whatever became of the one before it."""

import subprocess
import sys
from pathlib import Path

import pytest

from moorage_server import accelerator
from moorage_server.accelerator import hold_accelerators, hold_state
from moorage_server.errors import ServerError

HOLD = (
    "import sys, time; from pathlib import Path; from moorage_server import accelerator as a\n"
    "a.DEVICES = (sys.argv[1] + '/accel*',)\n"
    "locks = a.hold_accelerators(Path(sys.argv[1])); print(len(locks), flush=True); time.sleep(60)"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with two accelerators."""
    for name in ("accel0", "accel1"):
        (tmp_path / name).touch()
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(accelerator, "DEVICES", (f"{tmp_path}/accel*",))
    return tmp_path


def test_a_second_server_is_told_who_was_first_and_a_dead_one_holds_nothing(folder, monkeypatch):
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "2\n"
            with pytest.raises(ServerError) as caught:
                hold_accelerators(folder)
            assert caught.value.reason == "ACCELERATOR_BUSY"
            assert f"accel0 is held by process {first.pid}: {sys.executable} -c" in str(
                caught.value
            )
            monkeypatch.setenv("JAX_PLATFORMS", "cpu")
            assert hold_accelerators(folder) == []
            monkeypatch.delenv("JAX_PLATFORMS")
        finally:
            first.kill()
    locks = hold_accelerators(folder)
    assert [lock.is_locked for lock in locks] == [True, True]
    for lock in locks:
        lock.release()


def test_a_host_without_accelerators_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(accelerator, "DEVICES", (f"{tmp_path}/accel*",))
    assert hold_accelerators(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_state_has_one_server(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from moorage_server import accelerator as a\n"
    )
    code += "lock = a.hold_state(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "state")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "held\n"
            with pytest.raises(
                ValueError, match=f"(?s)state is held by process {first.pid}: .*its own"
            ):
                hold_state(tmp_path / "state")
        finally:
            first.kill()
    hold_state(tmp_path / "state").release()
