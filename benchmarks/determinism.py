"""What it costs that a row's numbers depend on no neighbour: ratios of one run.

    python benchmarks/determinism.py

The programs of SmolLM2-135M-Instruct as they are served, against

* the same, compiled without the options that forbid the compiler what changes numbers;
* one plain program: trunk, all logits and their log-softmax under one `jit`, nothing chunked, no
  layout stated, no option.

One CPU device, per-token log-probabilities. A figure is our time over theirs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import turns

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from in_process import Model

import real_models
from moorage_models.attention import Visibility
from moorage_models.decoder import trunk
from moorage_models.parameters import head_parameter
from moorage_server.engine import programs

SHAPES = [(8, 512), (32, 32)]
TARGET = "<= 1.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    folder = real_models.make("smollm2-135m-instruct")
    print(turns.HEADER)
    for dtype in ("float32", "bfloat16"):
        ours = Model(folder, dtype, SHAPES)
        with mock.patch.object(programs, "_COMPILER_OPTIONS", {}):
            loose = Model(folder, dtype, SHAPES)
        one = plain(ours)
        for rows, length in SHAPES:
            ids = np.random.default_rng(0).integers(3, 49_000, (rows, length), dtype=np.int32)
            runs = {
                "ours": turns.timed(lambda ids=ids, m=ours: m.score(ids)),
                "no options": turns.timed(lambda ids=ids, m=loose: m.score(ids)),
                "one plain program": turns.timed(lambda ids=ids, f=one: np.asarray(f(ids))),
            }
            taken = turns.take_turns(runs, args.rounds, budget=20.0)
            for other in ("no options", "one plain program"):
                name = f"{dtype}, {rows} x {length}: time / {other}"
                turns.show(name, turns.ratios(taken["ours"], taken[other]), TARGET)


def plain(model: Model) -> Callable[[np.ndarray], jax.Array]:
    """One program from ids to log-probabilities, with a model's weights, compiled as jax does."""
    config, params, mesh = model.config, model.params, model.mesh
    kind = params["embed"].dtype

    @jax.jit
    def run(params: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        visible = Visibility(segments=jnp.ones_like(ids))
        hidden = trunk(
            params, ids, positions, visible, config=config, mesh=mesh, compute_dtype=kind
        )
        table = params[head_parameter(config)].astype(jnp.float32)
        found = jax.nn.log_softmax(hidden[:, :-1] @ table.T)  # the table is the embeddings'
        return jnp.take_along_axis(found, ids[:, 1:, None], axis=-1)[..., 0]

    return lambda ids: run(params, ids)


if __name__ == "__main__":
    main()
