"""Real models: every token of every text against transformers, through the server's engine."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import real_models
from moorage_models.checkpoint import open_checkpoint
from moorage_models.monitor import LoadMonitor
from moorage_models.sources import ModelRequest, ModelSource
from moorage_server.engine import Bucket
from moorage_server.engine.local import LocalEngine
from moorage_server.engine.outputs import Profile
from moorage_server.requests import Wanted
from moorage_server.rows import make_rows
from moorage_server.scoring import make_work, score

REFERENCES = Path(__file__).parent / "data" / "real"
SLOW = [
    pytest.param(name, shape, marks=pytest.mark.soak)
    for name in ("smollm2-135m-instruct", "gemma-3-270m")
    for shape in ((1, 1), (2, 2), (1, 4))
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "shape"), [("smollm2-135m-instruct", (1, 1)), *SLOW])
def test_log_probabilities_are_those_of_transformers(name: str, shape: tuple[int, int]) -> None:
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = Mesh(devices, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    buckets = [Bucket(128, 4 * shape[0]), Bucket(1152, shape[0])]
    folder = real_models.make(name)
    request = ModelRequest(name, ModelSource.INTERNAL, str(folder), dtype="float32")
    checkpoint = open_checkpoint(request)
    profiles = (Profile(("logprobs",)),)
    engine = LocalEngine(mesh, buckets, profiles=profiles)
    engine.load("model", checkpoint, LoadMonitor())
    with np.load(REFERENCES / f"{name}.npz") as reference:
        ids = [reference[f"ids/{i}"] for i in range(5)]
        wanted = [reference[f"logprobs/{i}"] for i in range(5)]
    lengths = [len(row) for row in ids]
    rows = make_rows(np.concatenate(ids).tolist(), lengths, [])
    work = make_work(rows, Wanted(("logprobs",)), checkpoint.config, buckets, profiles)
    score(work, buckets, shape[0], lambda *asked: engine.forward("model", *asked))
    found = work.tensors["logprobs"]
    errors = np.concatenate(
        [
            np.abs(row[1:] - expected)
            for row, expected in zip(np.split(found, np.cumsum(lengths)[:-1]), wanted, strict=True)
        ]
    )
    assert errors.max() <= 2e-4
    assert errors.mean() <= 1e-5
