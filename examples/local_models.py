"""Models in the trainer's own process, as `grpo.py` and `distill.py` hold them.

The policy or the student is an ordinary `nnx.Module`. `LocalReference` is for comparison: a frozen
model here, run by the server's own programs, so that its bits are those of the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moorage_models import AutoModel, Decoder, ModelSource
from moorage_models.automodel import auto_mesh
from moorage_models.checkpoint import open_checkpoint
from moorage_models.monitor import LoadMonitor
from moorage_models.sources import ModelRequest
from moorage_server.engine import Answers, Batch, Bucket, Question
from moorage_server.engine.agreement import proven
from moorage_server.engine.local import LocalEngine
from moorage_server.engine.outputs import Profile
from moorage_server.requests import Wanted
from moorage_server.rows import make_rows
from moorage_server.scoring import make_work, score

Rows = Sequence[Sequence[int]]

_PROFILES = (Profile(("logprobs",)),)
_HANDLE = "reference"


def one_device() -> Mesh:
    """A mesh of the first device."""
    return auto_mesh(jax.make_mesh((1, 1), ("fsdp", "tp")))


def load(folder: Path) -> Decoder:
    """Loads a checkpoint in float32, to be trained.

    Args:
        folder: Where it is on this machine.
    """
    model, _ = AutoModel.from_pretrained(
        folder.name, one_device(), ModelSource.INTERNAL, str(folder), dtype="float32"
    )
    return model


def optimizer_of(model: Decoder, transform: optax.GradientTransformation) -> nnx.Optimizer:
    """Makes an optimizer of a model on one device.

    Both are laid out as an update leaves them: else the second update would be compiled again.

    Args:
        model: What is trained.
        transform: How.
    """
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    layout = NamedSharding(model.mesh, PartitionSpec())
    for part in (model, optimizer):
        nnx.update(part, jax.device_put(nnx.state(part), layout))
    return optimizer


def padded(rows: Rows, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads ragged rows on the right.

    Args:
        rows: Token ids.
        width: Length of the longest row, or more.

    Returns:
        The tokens, int32 `[rows, width]`, and their segments: 1, and 0 at padding.
    """
    tokens, segments = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    return tokens, segments


def next_logprobs(model: Decoder, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """What the model expects after every token but the last.

    Args:
        model: The model.
        tokens: Token ids `[rows, width]`.
        segments: As `padded` gives them.

    Returns:
        Log-probabilities, float32 `[rows, width - 1, vocabulary]`.
    """
    logits, _ = model(tokens, segment_ids=segments)
    return jax.nn.log_softmax(logits[:, :-1])


def token_logprobs(model: Decoder, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Log-probability of every token but the first, given those before it: `[rows, width - 1]`."""
    logprobs = next_logprobs(model, tokens, segments)
    return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]


@dataclass(frozen=True)
class Logprobs:
    """What a local reference answers; the field is named as in `moorage.Scores`.

    Attributes:
        logprobs: For each row float32 `[positions]`.
    """

    logprobs: list[np.ndarray]


class LocalReference:
    """A frozen model in this process that answers as a remote one does, to the bit.

    Args:
        folder: The checkpoint.
        buckets: The shapes (rows, length) that the server compiles, from `ServerInfo.buckets`. The
            server's mesh is of one device, as this one.
    """

    def __init__(self, folder: Path, buckets: Sequence[tuple[int, int]]) -> None:
        shapes = [Bucket(length, rows) for rows, length in buckets]
        self._engine = LocalEngine(one_device(), shapes, profiles=_PROFILES)
        request = ModelRequest(folder.name, ModelSource.INTERNAL, str(folder), dtype="float32")
        checkpoint = open_checkpoint(request)
        self._config = checkpoint.config
        self._engine.load(_HANDLE, checkpoint, LoadMonitor())
        served = self._engine.info().buckets_for(checkpoint.config.max_position)
        self._buckets = proven(
            served, checkpoint.compute_dtype, 1, lambda probe: self._engine.probe(_HANDLE, probe)
        )

    def forward_async(self, rows: Rows, *, from_position: int) -> Future[Logprobs]:
        """Scores rows, here and now; `moorage.Model.forward_async` says what.

        Args:
            rows: Ragged rows of token ids.
            from_position: The first position that is wanted.

        Returns:
            A future that is done.
        """
        packed = make_rows([token for row in rows for token in row], [*map(len, rows)], [])
        wanted = Wanted(outputs=("logprobs",), from_positions=(from_position,))
        work = make_work(packed, wanted, self._config, self._buckets, _PROFILES)
        score(work, self._buckets, 1, self._forward)
        work.check()
        ends = np.cumsum(work.row_lengths["logprobs"])[:-1]
        answer: Future[Logprobs] = Future()
        answer.set_result(Logprobs(np.split(work.tensors["logprobs"], ends)))
        return answer

    def _forward(self, batch: Batch, questions: Sequence[Question]) -> Answers:
        return self._engine.forward(_HANDLE, batch, questions)
