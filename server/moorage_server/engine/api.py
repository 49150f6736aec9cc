"""The seam between what answers clients and what owns the mesh.

On one host both live in one process. On several, the process that owns the mesh may die with its
peers, so nothing but what is declared here may pass between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from moorage_models.checkpoint import Checkpoint
from moorage_models.monitor import LoadMonitor
from moorage_models.plan import Plan
from moorage_server.engine.outputs import Profile


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
        profiles: The programs of the head that it can serve.
    """

    platform: str
    devices: tuple[Device, ...]
    mesh: dict[str, int]
    buckets: tuple[Bucket, ...]
    device_bytes: int
    profiles: tuple[Profile, ...]

    def buckets_for(self, max_position: int) -> tuple[Bucket, ...]:
        """Those of one model: up to the first length that holds its whole context."""
        longest = next((b.length for b in self.buckets if b.length >= max_position), None)
        return tuple(b for b in self.buckets if longest is None or b.length <= longest)


@dataclass(frozen=True)
class Probe:
    """One batch that is tried.

    Attributes:
        bucket: Its shape.
        rows: Which of the rows of this length it holds, by their numbers.
    """

    bucket: Bucket
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Padded rows for one forward pass.

    Attributes:
        tokens: Token ids, 0 where padded.
        segments: Segment of each token; 0 is padding.
        positions: Rotary positions.
        depth: How many layers are run; None for all of them and the final norm.
    """

    tokens: Int32[np.ndarray, "rows length"]
    segments: Int32[np.ndarray, "rows length"]
    positions: Int32[np.ndarray, "rows length"]
    depth: int | None = None

    @property
    def bucket(self) -> Bucket:
        """Its shape."""
        rows, length = self.tokens.shape
        return Bucket(length, rows)


@dataclass(frozen=True)
class Question:
    """What the head is asked after some tokens of a batch.

    Attributes:
        profile: The program that answers.
        after: The tokens, as indices into the batch's `rows * length`.
        targets: The token that is asked about.
        temperatures: The logits are divided by these.
        candidates: Other tokens that are asked about; `c` is at most the profile's size.
    """

    profile: Profile
    after: Int32[np.ndarray, " n"]
    targets: Int32[np.ndarray, " n"]
    temperatures: Float32[np.ndarray, " n"]
    candidates: Int32[np.ndarray, "n c"]


@dataclass(frozen=True)
class Answers:
    """What one forward pass gave.

    Attributes:
        tensors: For each question, by name, `[n, ...]`: as wide as the profile's size.
        execute_seconds: How long the devices were waited for.
        transfer_seconds: How long it took to bring the results to the host.
    """

    tensors: tuple[dict[str, np.ndarray], ...]
    execute_seconds: float
    transfer_seconds: float


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

    def compiles_after_ready(self) -> int:
        """Programs that were compiled for a forward pass: a bug if there are any."""
        ...

    def load(self, handle: str, checkpoint: Checkpoint, monitor: LoadMonitor) -> dict[int, int]:
        """Fetches, places and compiles a model, and keeps it under a handle.

        Returns:
            Bytes of parameters on each device, by device id.

        Raises:
            ModelError: The load failed or was cancelled; nothing of it is left.
        """
        ...

    def probe(self, handle: str, probe: Probe) -> Sequence[bytes]:
        """Runs a loaded model on rows that are tried: see `moorage_server.engine.agreement`.

        Returns:
            A digest of each row's hidden states.
        """
        ...

    def unload(self, handle: str) -> dict[int, int]:
        """Frees a model and returns the bytes that came back, by device id."""
        ...

    def forward(self, handle: str, batch: Batch, questions: Sequence[Question]) -> Answers:
        """Runs one batch.

        Args:
            handle: A loaded model.
            batch: Rows of the shape of a bucket.
            questions: What is wanted of it, each of a profile that the model is served with.
        """
        ...
