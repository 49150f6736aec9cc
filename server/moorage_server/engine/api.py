"""The seam between what answers clients and what owns the mesh.

On one host both live in one process. On several, the process that owns the mesh may die with its
peers, so nothing but what is declared here may pass between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from moorage_models.checkpoint import Checkpoint
from moorage_models.monitor import LoadMonitor
from moorage_models.plan import Plan


@dataclass(frozen=True, order=True)
class Bucket:
    """A compiled shape.

    Attributes:
        length: Tokens a row.
        rows: Rows; a multiple of the data-parallel size.
    """

    length: int
    rows: int


@dataclass(frozen=True)
class Device:
    """One device of the mesh.

    Attributes:
        id: Its id.
        kind: As the runtime names it.
    """

    id: int
    kind: str


@dataclass(frozen=True)
class Need:
    """What a model takes on each device; all devices of a mesh hold as much.

    Attributes:
        weights: Bytes of its parameters.
        temporaries: Bytes that its largest program takes while it runs, at the most.
    """

    weights: int
    temporaries: int


@dataclass(frozen=True)
class EngineInfo:
    """What an engine has.

    Attributes:
        platform: `cpu`, `tpu` or `gpu`.
        devices: The devices.
        mesh: Sizes of the mesh axes, outermost first.
        buckets: The shapes that it can serve, shortest first.
        device_bytes: Bytes on each device that models may take.
    """

    platform: str
    devices: tuple[Device, ...]
    mesh: dict[str, int]
    buckets: tuple[Bucket, ...]
    device_bytes: int

    def buckets_for(self, max_position: int) -> tuple[Bucket, ...]:
        """Those of one model: up to the first length that holds its whole context."""
        longest = next((b.length for b in self.buckets if b.length >= max_position), None)
        return tuple(b for b in self.buckets if longest is None or b.length <= longest)


@dataclass(frozen=True)
class Batch:
    """Padded rows for one forward pass; the first `lengths[i]` tokens of row `i` are real.

    Attributes:
        tokens: Token ids, 0 where padded.
        segments: Segment of each token; 0 is padding.
        positions: Rotary positions.
        lengths: Real tokens of each row.
    """

    tokens: Int32[np.ndarray, "rows length"]
    segments: Int32[np.ndarray, "rows length"]
    positions: Int32[np.ndarray, "rows length"]
    lengths: tuple[int, ...]


@runtime_checkable
class Engine(Protocol):
    """Owns the mesh, the loaded models and their programs. Called from threads."""

    def info(self) -> EngineInfo:
        """The devices, the mesh and the buckets."""
        ...

    def need(self, plan: Plan[Any], compute_dtype: str) -> Need:
        """What a model takes on each device, at the most, before anything of it is there."""
        ...

    def live_bytes(self) -> dict[int, int]:
        """Bytes of all arrays that are alive, by device id, as the runtime counts them."""
        ...

    def pool_bytes(self) -> int:
        """Host memory that models have left behind, kept for those to come."""
        ...

    def load(self, handle: str, checkpoint: Checkpoint, monitor: LoadMonitor) -> dict[int, int]:
        """Fetches, places and compiles a model, and keeps it under a handle.

        Returns:
            Bytes of parameters on each device, by device id.

        Raises:
            ModelError: The load failed or was cancelled; nothing of it is left.
        """
        ...

    def unload(self, handle: str) -> dict[int, int]:
        """Frees a model and returns the bytes that came back, by device id."""
        ...

    def forward(self, handle: str, batch: Batch, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Runs one batch.

        Args:
            handle: A loaded model.
            batch: Rows of the shape of a bucket.
            outputs: Names from the table of outputs.

        Returns:
            For each output `[tokens, ...]` over the real tokens of all rows in order: what the
            model says after each token.
        """
        ...
