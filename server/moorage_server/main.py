"""`moorage serve`: reads the settings, makes the engine, and serves until told to stop."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Sequence

from moorage_models.errors import ModelError
from moorage_models.sources import Policy
from moorage_server import logs
from moorage_server import settings as all_settings
from moorage_server.accelerator import hold_accelerators, hold_state
from moorage_server.access import Access
from moorage_server.cache import ModelCache
from moorage_server.engine import Bucket, Engine
from moorage_server.engine.local import LocalEngine, keep_compiled, make_mesh
from moorage_server.errors import ServerError
from moorage_server.journal import Journal
from moorage_server.serving import make_server, serve
from moorage_server.settings import Settings
from moorage_server.tls import TlsFiles


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server.

    Args:
        argv: The flags; those of the process if left out.

    Returns:
        The exit code: 0 after a stop that was asked for, 1 if the server could not start, 2 if the
        flags are wrong.
    """
    arguments = all_settings.parser().parse_args(argv)
    try:
        settings = all_settings.read(arguments)
        access = _access(settings)
        if arguments.validate:
            print("moorage serve: the settings are right")
            return 0
        logs.begin(settings.log_level, settings.log_format)
        held = [hold_state(settings.state)] if settings.state else []
        held += hold_accelerators()
        engine = _engine(settings)
    except (ModelError, ServerError, OSError, ValueError) as error:
        for line in str(error).splitlines():
            print(f"moorage serve: {line}", file=sys.stderr)
        return 1
    gc.collect()
    gc.freeze()  # imports alone make a whole collection take a tenth of a second
    gc.collect()  # or the next one would wait for a quarter as much again
    try:
        return asyncio.run(_serve(settings, engine, access))
    finally:
        for lock in held:
            lock.release()


async def _serve(settings: Settings, engine: Engine, access: Access) -> int:
    policy = Policy(roots=settings.root, places=settings.allow or None, verify=settings.verify)
    journal = Journal(settings.state / "models.json") if settings.state else None
    cache = ModelCache(engine, policy, journal=journal, limits=settings.limits)
    return await serve(make_server(cache, engine, policy, settings.queue_tokens, access), settings)


def _access(settings: Settings) -> Access:
    """Who may do what; reads the files that say so, of certificates too.

    Raises:
        ValueError: One of them is wrong.
    """
    if settings.tls_cert and settings.tls_key:
        TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca).context()
    return Access(settings.tokens)


def _engine(settings: Settings) -> Engine:
    mesh = make_mesh(dict(settings.mesh))
    rows = mesh.shape.get("fsdp", 1)
    engine = LocalEngine(
        mesh,
        [Bucket(length, count * rows) for count, length in settings.buckets],
        window=settings.window,
        stream=settings.stream,
        device_memory=settings.device_memory,
        profiles=settings.outputs,
    )
    keep_compiled(settings.compile_cache)
    return engine


if __name__ == "__main__":
    sys.exit(main())
