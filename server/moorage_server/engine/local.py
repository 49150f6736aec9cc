"""The engine of one host: the mesh, the models and the programs live in this process."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from moorage_models.arena import Arena
from moorage_models.automodel import load, placer_for
from moorage_models.checkpoint import Checkpoint
from moorage_models.errors import ModelError, Reason
from moorage_models.monitor import LoadMonitor
from moorage_models.plan import Plan
from moorage_models.ring import WINDOW_BYTES
from moorage_server.engine.agreement import batch_of
from moorage_server.engine.api import (
    Answers,
    Batch,
    Bucket,
    Device,
    EngineInfo,
    Need,
    Probe,
    Question,
)
from moorage_server.engine.compiles import CompileCounter
from moorage_server.engine.outputs import PROFILES, Profile, served
from moorage_server.engine.programs import Programs, compile_programs
from moorage_server.engine.temporaries import temporary_bytes

#: Sets of programs that are kept for models to come; every compile leaks some kilobytes for good.
_KEPT_PROGRAMS = 8

_POLL_SECONDS = 0.1

#: Of a device's memory, what models may take unless it is said.
DEVICE_FRACTION = 0.9

#: Of the host's memory, what models on CPU devices leave behind is kept up to one part in so many.
_KEPT_FRACTION = 4


@dataclass(frozen=True)
class _Loaded:
    params: dict[str, jax.Array]
    programs: Programs


class LocalEngine:
    """Owns a mesh of this process's devices."""

    def __init__(
        self,
        mesh: Mesh,
        buckets: Sequence[Bucket],
        *,
        window: int = WINDOW_BYTES,
        stream: bool = False,
        device_memory: float = DEVICE_FRACTION,
        profiles: Sequence[Profile] = PROFILES,
    ) -> None:
        """Makes an engine without models.

        Args:
            mesh: The mesh, axes Auto.
            buckets: The shapes that are compiled for every model.
            window: Bytes of host memory that a load may take beyond the model.
            stream: Whether weights go from hubs to the devices without a copy on this machine.
            device_memory: What models may take of each device: a fraction of its memory, or
                bytes if it is more than 1.
            profiles: The programs of the head that are compiled for every model.
        """
        self._mesh = mesh
        self._stream = stream
        self._buckets = tuple(sorted(buckets))
        self._models: dict[str, _Loaded] = {}
        self._programs: OrderedDict[object, Programs] = OrderedDict()
        self._lock = threading.Lock()
        devices = tuple(Device(d.id, d.device_kind) for d in mesh.devices.flat)
        platform = str(mesh.devices.flat[0].platform)
        self._arena = Arena(_host_bytes() // _KEPT_FRACTION)
        self._placer = placer_for(mesh, self._arena, window)
        self._info = EngineInfo(
            platform,
            devices,
            dict(mesh.shape),
            self._buckets,
            int(device_memory * (_memory_of(mesh) if device_memory <= 1 else 1)),
            tuple(profiles),
        )
        self._compiles = CompileCounter()

    def info(self) -> EngineInfo:
        """The devices, the mesh and the buckets."""
        return self._info

    def need(self, plan: Plan[Any], compute_dtype: str) -> Need:
        """What a model takes on each device, at the most."""
        buckets = self._info.buckets_for(plan.config.max_position)
        mesh = dict(self._mesh.shape)
        temporaries = temporary_bytes(
            plan, compute_dtype, mesh, buckets, self._info.platform, self._info.profiles
        )
        return Need(plan.device_bytes(mesh), temporaries)

    def live_bytes(self) -> dict[int, int]:
        """Bytes of all arrays that are alive, by device id."""
        return _device_bytes(jax.live_arrays())

    def pool_bytes(self) -> int:
        """Host memory that models have left behind, kept for those to come."""
        return self._arena.kept

    def load(self, handle: str, checkpoint: Checkpoint, monitor: LoadMonitor) -> dict[int, int]:
        """Fetches, places and compiles, side by side.

        A compile cannot be stopped: when the load ends early, one that runs is left to its end.
        """
        pool = ThreadPoolExecutor(1, "programs")
        try:
            programs = pool.submit(self._compile, checkpoint, monitor)
            params, _ = load(checkpoint, self._mesh, monitor, self._placer, stream=self._stream)
            self._models[handle] = _Loaded(params, _wait(programs, monitor))
        except BaseException:
            monitor.cancel()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return _device_bytes(params.values())

    def probe(self, handle: str, probe: Probe) -> list[bytes]:
        """Runs a loaded model on rows that are tried, and digests what each gives."""
        model = self._models[handle]
        batch = batch_of(probe, model.programs.config.vocab_size)
        hidden = model.programs.hidden(model.params, batch)
        shards = [shard for shard in hidden.addressable_shards if shard.replica_id == 0]
        shards.sort(key=lambda shard: shard.index[0].start or 0)
        rows = (row for shard in shards for row in np.asarray(shard.data))
        ends = batch.segments.sum(1)
        return [
            hashlib.sha256(row[:end].tobytes()).digest()
            for row, end in zip(rows, ends, strict=True)
        ]

    def unload(self, handle: str) -> dict[int, int]:
        """Frees a model's arrays, and counts those that are gone."""
        arrays = list(self._models.pop(handle).params.values())
        held = [_device_bytes([array]) for array in arrays]
        for array in arrays:
            array.delete()
        freed: dict[int, int] = {}
        for array, nbytes in zip(arrays, held, strict=True):
            for device, count in nbytes.items() if array.is_deleted() else ():
                freed[device] = freed.get(device, 0) + count
        return freed

    def forward(self, handle: str, batch: Batch, questions: Sequence[Question]) -> Answers:
        """Runs one batch through the stored programs."""
        model = self._models[handle]
        with self._compiles.counting():
            return model.programs.run(model.params, batch, questions)

    def compiles_after_ready(self) -> int:
        """Programs that were compiled for a forward pass: a bug if there are any."""
        return self._compiles.count

    def _compile(self, checkpoint: Checkpoint, monitor: LoadMonitor) -> Programs:
        dtypes = tuple((p.name, p.dtype) for p in checkpoint.plan.parameters)
        key = (checkpoint.config, dtypes, checkpoint.compute_dtype)
        with self._lock:
            if programs := self._programs.get(key):
                self._programs.move_to_end(key)
                return programs
        buckets = self.info().buckets_for(checkpoint.config.max_position)
        profiles = served(checkpoint.config, self._info.profiles)
        programs = compile_programs(
            checkpoint.plan, checkpoint.compute_dtype, self._mesh, buckets, profiles, monitor
        )
        with self._lock:
            self._programs[key] = programs
            while len(self._programs) > _KEPT_PROGRAMS:
                self._programs.popitem(last=False)
        return programs


def _wait(programs: Future[Programs], monitor: LoadMonitor) -> Programs:
    while not programs.done():
        monitor.check()
        wait([programs], _POLL_SECONDS)
    return programs.result()


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """A mesh over all devices.

    On CPU, as many devices are simulated as the mesh wants.

    Args:
        sizes: Sizes of the axes, outermost first; empty for all devices on `tp`.

    Raises:
        ModelError: INVALID_REQUEST if the sizes do not make up the devices there are.
    """
    wanted = math.prod(sizes.values())
    if sizes and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", wanted)
    devices = jax.devices()
    sizes = sizes or {"fsdp": 1, "tp": len(devices)}
    if math.prod(sizes.values()) != len(devices):
        axes = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ModelError(
            Reason.INVALID_REQUEST,
            f"mesh {axes} needs {wanted} devices, and there are {len(devices)} "
            f"({devices[0].device_kind}); choose sizes whose product is {len(devices)}",
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs on disk, in a folder per backend and version of jax.

    Also imports what lowers programs, which takes a tenth of a second: before the first load.
    """
    jax.jit(lambda x: x).lower(0.0)
    own = folder / f"{jax.default_backend()}-{jax.__version__}"
    own.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _memory_of(mesh: Mesh) -> int:
    """Bytes of each device's memory; CPU devices share the host's."""
    stats = mesh.devices.flat[0].memory_stats() or {}
    return int(stats.get("bytes_limit") or _host_bytes() // mesh.size)


def _device_bytes(arrays: Iterable[jax.Array]) -> dict[int, int]:
    totals: dict[int, int] = {}
    for array in arrays:
        for shard in array.addressable_shards:
            totals[shard.device.id] = totals.get(shard.device.id, 0) + shard.data.nbytes
    return totals


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
