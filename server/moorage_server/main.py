"""`moorage serve`: reads the flags, makes the engine, and serves until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc
from moorage_models.errors import ModelError
from moorage_models.ring import WINDOW_BYTES
from moorage_models.sources import Policy
from moorage_models.sources.source import cache_folder
from moorage_server.accelerator import hold_accelerators
from moorage_server.cache import ModelCache
from moorage_server.engine import Bucket, Engine
from moorage_server.engine.local import DEVICE_FRACTION, LocalEngine, keep_compiled, make_mesh
from moorage_server.errors import ServerError
from moorage_server.health import report
from moorage_server.journal import Journal
from moorage_server.service import (
    MAX_MESSAGE_BYTES,
    ModelService,
    NamingService,
    ScoringService,
    ServerService,
)
from moorage_server.status import ErrorInterceptor

#: Rows (per data-parallel device) and lengths that are compiled for every model.
DEFAULT_BUCKETS = "1x128,8x128,1x512,8x512,1x2048,1x8192"
_STOP_SECONDS = 10.0
_MIN_WINDOW_MIB = 96  # the reads that are under way take up to 64

_log = logging.getLogger("moorage")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server.

    Args:
        argv: The flags; those of the process if left out.

    Returns:
        The exit code: 0 after a stop that was asked for, 1 if the server could not start.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,  # packages that were imported above may have set it up already
    )
    try:
        held = hold_accelerators()
        mesh = make_mesh(_sizes(args.mesh))
        buckets = _buckets(args.buckets, mesh.shape.get("fsdp", 1))
        engine = LocalEngine(
            mesh,
            buckets,
            window=_window(args.window),
            stream=args.stream,
            device_memory=_device_memory(args.device_memory),
        )
        keep_compiled(args.compile_cache)
    except (ModelError, ServerError, OSError, ValueError) as error:
        print(f"moorage serve: {error}", file=sys.stderr)
        return 1
    if missing := [str(root) for root in args.root if not root.is_dir()]:
        print(f"moorage serve: --root {missing[0]} is not a directory", file=sys.stderr)
        return 1
    places = tuple(args.allow) if args.allow else None
    policy = Policy(roots=tuple(root.resolve() for root in args.root), places=places)
    journal = Journal(args.state / "models.json") if args.state else None
    if args.restore and journal is None:
        print("moorage serve: --restore needs --state, where the journal is", file=sys.stderr)
        return 1
    try:
        return asyncio.run(_serve(args.listen, engine, policy, journal, args.restore))
    finally:
        for lock in held:
            lock.release()


def make_server(cache: ModelCache, engine: Engine, policy: Policy) -> tuple[grpc.aio.Server, Any]:
    """A server with every service added, not yet listening, and its health service."""
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor()],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            # Clients ping through long silences: a load may be quiet, a forward pass long.
            ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
        ],
    )
    pb_grpc.add_NamingServiceServicer_to_server(NamingService(cache, engine), server)
    pb_grpc.add_ModelServiceServicer_to_server(ModelService(cache), server)
    pb_grpc.add_ScoringServiceServicer_to_server(ScoringService(cache, engine), server)
    pb_grpc.add_ServerServiceServicer_to_server(ServerService(cache, engine, policy), server)
    healthy: Any = getattr(health, "aio").HealthServicer()  # noqa: B009 - untyped
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    names = [service.full_name for service in pb.DESCRIPTOR.services_by_name.values()]
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    return server, healthy


async def _serve(
    listen: str, engine: Engine, policy: Policy, journal: Journal | None, restore: bool
) -> int:
    cache = ModelCache(engine, policy, journal=journal)
    server, healthy = make_server(cache, engine, policy)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        print(f"moorage serve: cannot listen on {listen}: is it in use?", file=sys.stderr)
        return 1
    if restore:
        cache.restore()
    await server.start()
    reporting = asyncio.create_task(report(cache, healthy))
    info = engine.info()
    mesh = ",".join(f"{name}={size}" for name, size in info.mesh.items())
    host = listen.rsplit(":", 1)[0]
    _log.info("serving on %s:%d, mesh %s of %s", host, port, mesh, info.devices[0].kind)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    _log.info("stopping")
    reporting.cancel()
    await healthy.enter_graceful_shutdown()
    cache.stop()
    await server.stop(_STOP_SECONDS)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moorage serve", description="Runs the moorage server.")
    parser.add_argument("--listen", default="127.0.0.1:8470", help="address and port")
    parser.add_argument(
        "--mesh", default="", help="sizes of the axes, as fsdp=2,tp=4; default: all devices on tp"
    )
    parser.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a directory that models may be loaded from; may be repeated",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN",
        help="what may be loaded from hubs and buckets, as huggingface:google/*, "
        "kaggle:google/gemma/* or gcs:bucket/models/*; may be repeated; default: anything",
    )
    parser.add_argument(
        "--buckets",
        default=DEFAULT_BUCKETS,
        help="shapes to compile, rows per data-parallel device x length; default: %(default)s",
    )
    parser.add_argument(
        "--device-memory",
        default=str(DEVICE_FRACTION),
        metavar="AMOUNT",
        help="what models may take of each device: a fraction of its memory, as 0.9, or an amount, "
        "as 12GiB; CPU devices share the host's memory; default: %(default)s",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=WINDOW_BYTES >> 20,
        metavar="MIB",
        help="host memory that a load may take beyond the model, in MiB; default: %(default)s",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="bring safetensors from hubs to the devices without a copy on this machine; they are "
        "not compared with the hubs' digests then",
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="where a journal is kept of what is loaded and leased",
    )
    parser.add_argument(
        "--restore",
        action="store_true",
        help="load again what the journal in --state says was loaded; leases and handles hold",
    )
    parser.add_argument(
        "--compile-cache",
        type=Path,
        default=cache_folder() / "compiled",
        metavar="DIR",
        help="where compiled programs are kept; default: %(default)s",
    )
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", default="info", choices=levels, help="how much is logged")
    return parser


def _sizes(text: str) -> dict[str, int]:
    """`fsdp=2,tp=4` as sizes of axes."""
    sizes = {}
    for part in text.split(",") if text else []:
        name, _, size = part.partition("=")
        if name not in ("fsdp", "tp") or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh {text!r}: wanted axes fsdp and tp, as fsdp=2,tp=4")
        sizes[name] = int(size)
    return sizes


def _device_memory(text: str) -> float:
    """`0.9` as a fraction, `12GiB` as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(MiB|GiB)?", text)
    amount = float(match[1]) if match else 0.0
    if not match or amount <= 0 or (match[2] is None and amount > 1):
        raise ValueError(
            f"--device-memory {text!r}: wanted a fraction up to 1, as 0.9, or an amount, as 12GiB"
        )
    return amount * {"MiB": 1 << 20, "GiB": 1 << 30, None: 1}[match[2]]


def _window(mebibytes: int) -> int:
    """`256` as bytes."""
    if mebibytes < _MIN_WINDOW_MIB:
        raise ValueError(f"--window {mebibytes}: wanted at least {_MIN_WINDOW_MIB} MiB")
    return mebibytes << 20


def _buckets(text: str, data_parallel: int) -> list[Bucket]:
    """`1x128,8x512` as buckets."""
    buckets = []
    for part in text.split(","):
        rows, _, length = part.partition("x")
        sizes = [int(x) if x.isdecimal() else 0 for x in (rows, length)]
        if sizes[0] not in (1, 2, 4, 8, 16, 32, 64, 128) or sizes[1] % 128 or not sizes[1]:
            raise ValueError(
                f"--buckets {text!r}: rows are a power of two up to 128, lengths multiples of 128, "
                "as 1x128,8x512"
            )
        buckets.append(Bucket(sizes[1], sizes[0] * data_parallel))
    return buckets


if __name__ == "__main__":
    sys.exit(main())
