"""Settings: a file and flags of the same names, what is wrong with them, and their table."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moorage_models.sources import ModelRequest, ModelSource
from moorage_server import settings
from moorage_server.limits import Limits

DOCS = Path(__file__).parent.parent / "docs"


def read(*flags: str | Path) -> settings.Settings:
    return settings.read(settings.parser().parse_args(list(map(str, flags))))


def problems(*flags: str | Path) -> list[str]:
    with pytest.raises(ValueError, match=r".") as caught:
        read(*flags)
    return str(caught.value).splitlines()


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "moorage.toml").write_text(text)
        return tmp_path / "moorage.toml"

    return write


def test_nothing_said_is_a_server_for_this_machine_alone():
    found = read()
    assert found == settings.Settings()
    assert (found.listen, found.insecure, found.tokens) == ("127.0.0.1:8470", False, None)
    assert found.buckets == ((1, 128), (8, 128), (1, 512), (8, 512), (1, 2048), (1, 8192))
    assert (found.device_memory, found.window) == (0.9, 256 << 20)
    assert found.limits == Limits()


def test_a_file_says_what_flags_say(config, tmp_path):
    file = config(f"""
        listen = "127.0.0.1:9000"
        mesh = "fsdp=2,tp=4"
        root = ["{tmp_path}"]
        allow = ["huggingface:google/*"]
        verify = true
        queue_tokens = 1000
        drain_seconds = 2.5
        device_memory = "12GiB"
        max_client_leases = 3
        preload = [
          {{ model_id = "gemma2_2b_it", source = "kaggle", model_path = "google/gemma-2/flax/x" }},
          "Qwen/Qwen3-0.6B",
        ]
    """)
    found = read("--config", file)
    flags = ["--listen=127.0.0.1:9000", "--mesh=fsdp=2,tp=4", f"--root={tmp_path}"]
    flags += ["--allow=huggingface:google/*", "--verify", "--queue-tokens=1000"]
    flags += ["--drain-seconds=2.5", "--device-memory=12GiB", "--max-client-leases=3"]
    flags += ["--preload=gemma2_2b_it,source=kaggle,model_path=google/gemma-2/flax/x"]
    assert found == read(*flags, "--preload=Qwen/Qwen3-0.6B")
    assert found.mesh == {"fsdp": 2, "tp": 4}
    assert found.device_memory == 12 * 2**30
    assert found.limits.client_leases == 3
    kaggle = ModelRequest("gemma2_2b_it", ModelSource.KAGGLE, "google/gemma-2/flax/x")
    assert found.preload == (kaggle, ModelRequest("Qwen/Qwen3-0.6B", ModelSource.HUGGINGFACE))


def test_flags_win(config):
    file = config('listen = "127.0.0.1:1"\nverify = true\nqueue_tokens = 5')
    found = read("--config", file, "--listen", "127.0.0.1:2", "--no-verify")
    assert (found.listen, found.verify, found.queue_tokens) == ("127.0.0.1:2", False, 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("drain_second = 3", "'drain_second'; did you mean drain_seconds?"),
        ("verify = 'yes'", "verify 'yes': wanted true or false"),
        ("root = '/nowhere'", "root '/nowhere': wanted a list"),
        ("root = ['/nowhere/at/all']", "is not a directory"),
        ("queue_tokens = 0", "queue_tokens 0: wanted a whole number above 0"),
        ("queue_tokens = true", "queue_tokens True: wanted text"),
        ("max_connections = 3000000000", "max_connections 3000000000: wanted at most 2147483647"),
        ("drain_seconds = 'soon'", "drain_seconds 'soon': wanted seconds"),
        ("mesh = 'dp=2'", "mesh 'dp=2': wanted axes fsdp and tp"),
        ("mesh = 'tp=1,tp=2'", "mesh 'tp=1,tp=2': tp is there twice"),
        ("buckets = '3x128'", "buckets '3x128': rows are a power of two"),
        ("outputs = 'logprobs,rank'", "'rank' is none of the outputs"),
        ("device_memory = '2'", "wanted a fraction up to 1"),
        ("window = 3", "window 3: wanted at least 96 MiB"),
        ("listen = '8470'", "listen '8470': it is not host:port"),
        ("listen = '127.0.0.1:99999'", "listen '127.0.0.1:99999': ports go up to 65535"),
        ("health_listen = '[::1]:65536'", "ports go up to 65535"),
        ("state = '~nosuchuser/x'", "state '~nosuchuser/x': there is no such user"),
        (
            "listen = 'localhost:1'\nstatus_listen = 'localhost:1'",
            "listen and status_listen are both 'localhost:1'",
        ),
        (
            "health_listen = 'unix:/x'\nstatus_listen = 'unix:/x'",
            "health_listen and status_listen are both 'unix:/x'",
        ),
        ("log_format = 'xml'", "wanted one of text, json"),
        ("tokens = '/nowhere'", "tokens '/nowhere': there is no such file"),
        ("preload = ['x,source=moon']", "'moon' is no source"),
        ("preload = [{model_id='x', source='moon'}]", "'moon' is no source"),
        ("preload = [{model_id='x', path='y'}]", "'path' is none of source, options, model_id"),
        ("verify = true\nstream = true", "verify reads what is on the disk, stream leaves none"),
        ("restore = true", "restore needs state"),
        ("tls_client_ca = '/dev/null'", "there is no such file"),
        ("listen = ", "moorage.toml"),
    ],
)
def test_what_is_wrong_is_said(config, text, words):
    said = problems("--config", config(text))
    assert any(words in line for line in said), said


def test_all_that_is_wrong_is_said_at_once(config):
    said = problems("--config", config("window = 1\nrestor = true"), "--queue-tokens", "none")
    assert len(said) == 3
    assert any(line.startswith("--queue-tokens 'none'") for line in said)


@pytest.mark.parametrize("listen", ["0.0.0.0:8470", "[::]:8470", "tpu-host:8470", "10.0.0.7:1"])
@pytest.mark.parametrize("name", ["listen", "status_listen"])
def test_beyond_loopback_there_must_be_tls_or_tokens(tmp_path, name, listen):
    tokens = tmp_path / "tokens"
    tokens.write_text("a admin 0123456789abcdef")
    flag = f"--{name.replace('_', '-')}={listen}"
    assert "beyond loopback, with neither TLS nor tokens" in problems(flag)[0]
    assert getattr(read(flag, "--insecure"), name) == listen
    assert getattr(read(flag, "--tokens", tokens), name) == listen
    assert getattr(read(flag, "--tls-cert", tokens, "--tls-key", tokens), name) == listen


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/x"])
def test_on_this_machine_there_need_be_neither(listen):
    assert read("--listen", listen).listen == listen


def test_addresses_may_share_a_port_that_is_yet_to_be_found():
    found = read("--listen=127.0.0.1:0", "--status-listen=127.0.0.1:0")
    assert found.listen == found.status_listen
    assert read("--listen=127.0.0.1:65535").listen == "127.0.0.1:65535"


def test_validate_says_what_is_right_and_what_is_wrong(config):
    def validate(text: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moorage_server.main", "--validate", "--config"]
        return subprocess.run([*command, config(text)], capture_output=True, text=True, check=False)

    right, wrong = validate("verify = true"), validate("verify = 1\nwindow = 1")
    assert (right.returncode, right.stdout) == (0, "moorage serve: the settings are right\n")
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines() == [
        "moorage serve: verify 1: wanted true or false",
        "moorage serve: window 1: wanted at least 96 MiB",
    ]


def test_every_setting_is_documented_as_the_code_has_it():
    page = (DOCS / "configuration.md").read_text()
    between = page.partition("<!-- settings -->\n")[2].partition("<!-- /settings -->")[0]
    assert between.strip() == settings.table().strip()


def test_limits_are_settings_of_the_same_names():
    changed = replace(settings.Settings(), max_models=2, max_client_tokens=7)
    assert changed.limits == Limits(models=2, client_tokens=7)
