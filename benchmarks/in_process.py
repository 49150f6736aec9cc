"""A real model in this process, scored without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moorage_models.checkpoint import open_checkpoint
from moorage_models.monitor import LoadMonitor
from moorage_models.sources import ModelRequest, ModelSource
from moorage_server.engine import Answers, Batch, Bucket, Question
from moorage_server.engine.local import LocalEngine, make_mesh
from moorage_server.engine.outputs import Profile
from moorage_server.requests import Wanted
from moorage_server.rows import make_rows
from moorage_server.scoring import make_work, score

_PROFILES = (Profile(("logprobs",)),)
_HANDLE = "model"


class Model:
    """A model on one CPU device that gives per-token log-probabilities.

    Args:
        folder: The checkpoint.
        dtype: Of the parameters and the arithmetic.
        shapes: Rows and length of what is compiled.

    Attributes:
        config: The model's configuration.
        params: Its parameters, by name.
        mesh: Of one device.
    """

    def __init__(self, folder: Path, dtype: str, shapes: Sequence[tuple[int, int]]) -> None:
        self.mesh = make_mesh({"fsdp": 1, "tp": 1})
        buckets = [Bucket(length, rows) for rows, length in shapes]
        self._engine = LocalEngine(self.mesh, buckets, profiles=_PROFILES)
        request = ModelRequest(folder.name, ModelSource.INTERNAL, str(folder), dtype=dtype)
        checkpoint = open_checkpoint(request)
        self.config = checkpoint.config
        self._engine.load(_HANDLE, checkpoint, LoadMonitor())
        self.params = self._engine._models[_HANDLE].params

    def score(self, ids: np.ndarray) -> np.ndarray:
        """From ids [rows, length] to as many log-probabilities, packed; NaN at first tokens."""
        return self.scored(ids)[0]

    def scored(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        """The same, and the seconds that the devices took."""
        buckets = self._engine.info().buckets
        rows = make_rows(ids.reshape(-1).tolist(), [ids.shape[1]] * len(ids), [])
        work = make_work(rows, Wanted(outputs=("logprobs",)), self.config, buckets, _PROFILES)
        score(work, buckets, 1, self._forward)
        work.check()
        return work.tensors["logprobs"], work.timings.execute + work.timings.transfer

    def _forward(self, batch: Batch, questions: Sequence[Question]) -> Answers:
        return self._engine.forward(_HANDLE, batch, questions)
