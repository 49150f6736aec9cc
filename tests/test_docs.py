"""The documentation: its code runs, its settings are real, its commands exist, and it builds."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import certificates
from conftest import GOLDEN
from moorage import cli
from moorage_server.settings import SETTINGS, parser
from server_process import server_process

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}

#: Pages whose code runs against a server of tests/golden; other pages have tests of their own.
SERVED = ["index.md", "client.md", "protocol.md", "security.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("docs")
    outputs = "logprobs,entropy,top_k"
    with server_process(GOLDEN, folder, mesh="fsdp=1,tp=1", outputs=outputs) as server:
        yield server.address


@pytest.mark.parametrize("page", SERVED)
def test_its_code_runs(
    page: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOORAGE_SERVER", address)
    monkeypatch.chdir(tmp_path)
    certificates.authority(tmp_path).file.rename("ca.crt")
    names: dict[str, object] = {}
    assert blocks(page, "python")
    for text in blocks(page, "python"):
        exec(compile(text, page, "exec"), names)
    for found in ("client",):
        if found in names:
            names[found].close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES)
def test_its_settings_are_real(page: str) -> None:
    for text in blocks(page, "toml"):
        assert tomllib.loads(text).keys() <= SETTINGS.keys()


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_exist(page: str) -> None:
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["moorage", "serve"]:
                flags = [word.partition("=")[0] for word in words if word.startswith("--")]
                known = set(parser()._option_string_actions)
                assert set(flags) <= known, line
            elif words[:1] == ["moorage"]:
                cli._parser().parse_args(words[1:])


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None:
        pytest.skip('mkdocs-material is missing: pip install ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, tmp_path / "site"], cwd=ROOT, env=quiet, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    for page, said in {
        "index": "Load and score",
        "repository/benchmarks/README.md": "Latest",
        "repository/deploy/kubernetes": "statefulset.yaml",
    }.items():
        assert said in (site / f"{page}.html").read_text()
