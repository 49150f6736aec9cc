"""`moorage serve`: reads the flags, makes the engine, and serves until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from moorage_models.errors import ModelError
from moorage_models.ring import WINDOW_BYTES
from moorage_models.sources import Policy
from moorage_models.sources.source import cache_folder
from moorage_server.accelerator import hold_accelerators
from moorage_server.cache import ModelCache
from moorage_server.engine import Bucket, Engine
from moorage_server.engine.local import DEVICE_FRACTION, LocalEngine, keep_compiled, make_mesh
from moorage_server.engine.outputs import OUTPUTS, PROFILES, Profile
from moorage_server.errors import ServerError
from moorage_server.journal import Journal
from moorage_server.scheduler import QUEUE_TOKENS
from moorage_server.serving import make_server, serve

#: Rows (per data-parallel device) and lengths that are compiled for every model.
DEFAULT_BUCKETS = "1x128,8x128,1x512,8x512,1x2048,1x8192"
#: How long requests that were taken may take after SIGTERM.
DRAIN_SECONDS = 30.0
_MIN_WINDOW_MIB = 96  # the reads that are under way take up to 64


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
        if args.verify and args.stream:
            raise ValueError("--verify reads what is on the disk, --stream leaves none: choose one")
        held = hold_accelerators()
        mesh = make_mesh(_sizes(args.mesh))
        buckets = _buckets(args.buckets, mesh.shape.get("fsdp", 1))
        engine = LocalEngine(
            mesh,
            buckets,
            window=_window(args.window),
            stream=args.stream,
            device_memory=_device_memory(args.device_memory),
            profiles=_profiles(args.outputs),
        )
        keep_compiled(args.compile_cache)
    except (ModelError, ServerError, OSError, ValueError) as error:
        print(f"moorage serve: {error}", file=sys.stderr)
        return 1
    if missing := [str(root) for root in args.root if not root.is_dir()]:
        print(f"moorage serve: --root {missing[0]} is not a directory", file=sys.stderr)
        return 1
    places = tuple(args.allow) if args.allow else None
    roots = tuple(root.resolve() for root in args.root)
    policy = Policy(roots=roots, places=places, verify=args.verify)
    journal = Journal(args.state / "models.json") if args.state else None
    if args.restore and journal is None:
        print("moorage serve: --restore needs --state, where the journal is", file=sys.stderr)
        return 1
    try:
        return asyncio.run(_serve(args, engine, policy, journal))
    finally:
        for lock in held:
            lock.release()


async def _serve(
    args: argparse.Namespace, engine: Engine, policy: Policy, journal: Journal | None
) -> int:
    cache = ModelCache(engine, policy, journal=journal)
    server = make_server(cache, engine, policy, args.queue_tokens)
    return await serve(server, args.listen, args.drain_seconds, restore=args.restore)


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
        "--outputs",
        default="",
        metavar="NAMES",
        help="outputs to serve, as logprobs,top_k: no programs are compiled for others; default: "
        f"all, {','.join(OUTPUTS)}",
    )
    parser.add_argument(
        "--queue-tokens",
        type=int,
        default=QUEUE_TOKENS,
        metavar="TOKENS",
        help="how many tokens may wait for the devices, padding included; default: %(default)s",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=DRAIN_SECONDS,
        metavar="SECONDS",
        help="how long requests that were taken may take after SIGTERM; default: %(default)s",
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
        "--verify",
        action="store_true",
        help="read every byte of a model's files before they are loaded: compare what hubs state "
        "with what the disk has, and tell directories by their content",
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


def _profiles(text: str) -> tuple[Profile, ...]:
    """`logprobs,top_k` as the programs that give no others."""
    names = text.split(",") if text else list(OUTPUTS)
    if unknown := [name for name in names if name not in OUTPUTS]:
        raise ValueError(f"--outputs {text!r}: {unknown[0]!r} is none of {', '.join(OUTPUTS)}")
    return tuple(profile for profile in PROFILES if profile.outputs[-1] in names)


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
