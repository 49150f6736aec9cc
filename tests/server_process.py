"""A server in a process of its own, on a free port."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_SECONDS = 60.0


@dataclass
class ServerProcess:
    """A server process.

    Attributes:
        process: The process.
        address: host:port.
        log: The file that its output goes to.
    """

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def stop(self, seconds: float = 30.0) -> int:
        """Asks it to stop, and gives its exit code."""
        self.process.terminate()
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(address: str, *flags: str | Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts a server on CPU devices, as many as its mesh wants."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "moorage_server.main", "--listen", address, *flags]
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, env=environment | {"JAX_PLATFORMS": "cpu"}, stdout=output, stderr=output
        )


@contextmanager
def server_process(
    root: Path,
    folder: Path,
    *flags: str,
    address: str = "",
    mesh: str = "fsdp=2,tp=2",
    buckets: str = "1x128",
    outputs: str = "logprobs,logits",
    token: str = "",
) -> Iterator[ServerProcess]:
    """Starts a server and waits until its health is SERVING; kills it in the end if it still runs.

    Args:
        root: What it may load from.
        folder: Where its log and its compiled programs are kept.
        flags: Further flags.
        address: host:port; a free one if left out.
        mesh: Its --mesh.
        buckets: Its --buckets.
        outputs: Its --outputs; fewer are compiled sooner.
        token: What it wants to see before it tells of its health.
    """
    address = address or f"127.0.0.1:{free_port()}"
    log = folder / "server.log"
    where = ["--root", root, "--compile-cache", folder / "compiled"]
    process = start(
        address, *where, "--mesh", mesh, "--buckets", buckets, "--outputs", outputs, *flags, log=log
    )
    try:
        _wait_until_serving(process, address, log, token)
        yield ServerProcess(process, address, log)
    finally:
        process.kill()
        process.wait()


@contextmanager
def running_server(root: Path, *, mesh: str) -> Iterator[str]:
    """The address of a server process whose log nobody needs."""
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(root, Path(folder), mesh=mesh, outputs="") as server,
    ):
        yield server.address


def _wait_until_serving(
    process: subprocess.Popen[bytes], address: str, log: Path, token: str
) -> None:
    carried = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check.future(
            health_pb2.HealthCheckRequest(),
            wait_for_ready=True,
            timeout=START_SECONDS,
            metadata=carried,
        )
        while not answer.done():
            assert process.poll() is None, log.read_text()
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        assert answer.result().status == health_pb2.HealthCheckResponse.SERVING
