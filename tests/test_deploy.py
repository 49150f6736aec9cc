"""What the Dockerfile and the deployments say of the server is true of it."""

import json
import re
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from moorage_server import probe, serving, settings
from moorage_server.health import READY

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
CONFIGS = sorted(DEPLOY.rglob("moorage.toml"))
TEXTS = [ROOT / "Dockerfile", *(p for p in sorted(DEPLOY.rglob("*")) if p.is_file())]
UNIT = (DEPLOY / "systemd" / "moorage.service").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
KUBERNETES = {p.name: yaml.safe_load(p.read_text()) for p in DEPLOY.rglob("*.yaml")}
POD = KUBERNETES["statefulset.yaml"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]

#: From the end of the drain to that of the process, in seconds.
END = serving._CLOSE_SECONDS + serving._EXIT_SECONDS


def config(name: str) -> dict:
    return tomllib.loads((DEPLOY / name / "moorage.toml").read_text())


def lines(text: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=?\s*(.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.parent.name)
def test_the_server_takes_the_settings(file, tmp_path):
    text = file.read_text()
    for path in re.findall('"(/[^"]+)"', text):  # as if its files and folders were there
        here = tmp_path / path[1:]
        (here if path == "/models" else here.parent).mkdir(parents=True, exist_ok=True)
        if path != "/models":
            here.touch()
    (tmp_path / "moorage.toml").write_text(text.replace('"/', f'"{tmp_path}/'))
    flags = ["--config", str(tmp_path / "moorage.toml")]
    if file.parent.name == "container":  # which has to be told more, see below
        with pytest.raises(ValueError, match="neither TLS nor tokens"):
            settings.read(settings.parser().parse_args(flags))
        flags += ["--insecure"]
    found = settings.read(settings.parser().parse_args(flags))
    assert found.restore
    assert found.state == tmp_path / "var/lib/moorage"


def test_there_are_configs_for_all_deployments():
    assert [file.parent.name for file in CONFIGS] == ["container", "kubernetes", "systemd"]


@pytest.mark.parametrize(
    "command",
    [
        *(line for line in lines(UNIT, "Exec[A-Za-z]*") if " serve " in line),
        " ".join(["moorage", *json.loads(lines(DOCKERFILE, "CMD")[-1])]),
        " ".join(["moorage", *CONTAINER["args"]]),
    ],
)
def test_the_server_takes_the_flags(command):
    assert " serve --config /etc/moorage/moorage.toml" in command
    settings.parser().parse_args(command.split(" serve ")[1].split())


def test_the_image_is_tried_with_settings_that_there_are():
    written = tomllib.loads((DEPLOY / "container" / "settings.toml").read_text())
    assert written.keys() <= settings.SETTINGS.keys()


def test_probes_ask_where_and_what_health_answers():
    health_port = int(config("kubernetes")["health_listen"].rpartition(":")[2])
    probes = {
        kind: CONTAINER[f"{kind}Probe"]["grpc"] for kind in ("startup", "readiness", "liveness")
    }
    assert {kind: p.get("service", "") for kind, p in probes.items()} == {
        "startup": "",
        "readiness": READY,
        "liveness": "",
    }
    assert {p["port"] for p in probes.values()} == {health_port}
    assert {p["containerPort"] for p in CONTAINER["ports"]} == {
        int(config("kubernetes")[name].rpartition(":")[2]) for name in ("listen", "health_listen")
    }


@pytest.mark.parametrize(("name", "text"), [("container", DOCKERFILE), ("systemd", UNIT)])
def test_commands_ask_where_health_answers(name, text):
    assert re.findall(r"\d[\d.]+:\d+", " ".join(x for x in text.splitlines() if "probe" in x)) == [
        config(name)["health_listen"]
    ]


def test_there_is_time_to_drain():
    (unit,) = lines(UNIT, "TimeoutStopSec")
    for name, seconds in (
        ("kubernetes", POD["terminationGracePeriodSeconds"]),
        ("systemd", int(unit)),
    ):
        assert config(name)["drain_seconds"] + END + 10 <= seconds


def test_the_pod_runs_the_image_as_its_user_with_its_volumes():
    (user,) = lines(DOCKERFILE, "USER")
    (volumes,) = lines(DOCKERFILE, "VOLUME")
    security = POD["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    mounts = {m["mountPath"]: m for m in CONTAINER["volumeMounts"]}
    assert {path for path, m in mounts.items() if not m.get("readOnly")} == set(json.loads(volumes))


def test_what_the_pod_mounts_is_there():
    volumes = {v["name"] for v in POD["volumes"]}
    claims = KUBERNETES["statefulset.yaml"]["spec"]["volumeClaimTemplates"]
    volumes |= {claim["metadata"]["name"] for claim in claims}
    assert {m["name"] for m in CONTAINER["volumeMounts"]} == volumes
    folders = [m["mountPath"] for m in CONTAINER["volumeMounts"]]
    for name in ("tls_cert", "tls_key", "tokens", "state"):
        path = config("kubernetes")[name]
        assert any(path.startswith(folder) for folder in folders), path


def test_the_kustomization_lists_every_manifest():
    listed = KUBERNETES["kustomization.yaml"]["resources"]
    assert set(listed) == KUBERNETES.keys() - {"kustomization.yaml"}


def test_what_is_selected_is_labelled():
    labels = KUBERNETES["statefulset.yaml"]["spec"]["template"]["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/name": "moorage"}
    for selected in (
        KUBERNETES["statefulset.yaml"]["spec"]["selector"]["matchLabels"],
        KUBERNETES["service.yaml"]["spec"]["selector"],
        KUBERNETES["poddisruptionbudget.yaml"]["spec"]["selector"]["matchLabels"],
        KUBERNETES["networkpolicy.yaml"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selected == labels


def test_the_image_holds_what_the_wheel_is_made_of():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        folder.split("/")[0]
        for folder in packages["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    } | {"pyproject.toml", packages["project"]["readme"], "deploy/container/moorage.toml"}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert allowed == needed
    assert all(
        f"COPY {name}" in DOCKERFILE or name in ("pyproject.toml", "README.md") for name in needed
    )


def test_versions_are_the_packages():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG VERSION={version}" in DOCKERFILE
    assert KUBERNETES["kustomization.yaml"]["images"][0]["newTag"] == f"{version}-tpu"


@pytest.fixture(scope="module")
def address():
    servicer = health.HealthServicer()
    status = health_pb2.HealthCheckResponse
    servicer.set("", status.SERVING)
    servicer.set(READY, status.NOT_SERVING)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_the_probe_tells_health_by_its_exit_code(address, capsys):
    assert probe.main([address]) == 0
    assert capsys.readouterr() == ("", "")
    assert probe.main([address, READY]) == 1
    assert capsys.readouterr().err == f"ready at {address}: NOT_SERVING\n"
    assert probe.main([address, "0123456789ab"]) == 1
    assert "NOT_FOUND" in capsys.readouterr().err


def test_the_probe_tells_that_nobody_answers(capsys):
    assert probe.main(["127.0.0.1:1"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_the_probe_waits_for_health(address, monkeypatch):
    said = iter(["UNAVAILABLE, not yet", "NOT_SERVING", probe.SERVING])
    monkeypatch.setattr(probe, "probe", lambda *_: next(said))
    monkeypatch.setattr(probe.time, "sleep", lambda _: None)
    assert probe.main([address, "--wait", "60"]) == 0
