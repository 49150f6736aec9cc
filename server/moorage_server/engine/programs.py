"""The compiled programs of a model: one trunk a bucket, one head an output.

They are compiled ahead of time, from shapes alone, and take the weights as arguments. A call
never compiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from moorage_models.attention import Visibility
from moorage_models.config import ModelConfig
from moorage_models.decoder import logits_of, trunk
from moorage_models.dtypes import numpy_dtype
from moorage_models.monitor import LoadMonitor
from moorage_models.ops import partition
from moorage_models.parameters import head_parameter
from moorage_models.plan import Plan
from moorage_models.sharding import FSDP
from moorage_server.engine.api import Batch, Bucket
from moorage_server.engine.outputs import OUTPUTS, served

#: Tokens of a head chunk on each data-parallel device; the head never holds more logits.
CHUNK = 128

_COMPILE_THREADS = 2

T = TypeVar("T")

#: Rows must not change with their neighbours: without the first, bfloat16 rows differ between
#: buckets. The second keeps XLA's CPU compiler from converting a whole bfloat16 stack to float32
#: ahead of the loop over layers.
_COMPILER_OPTIONS: Mapping[str, dict[str, str | bool]] = {
    "cpu": {
        "xla_allow_excess_precision": False,
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    },
    "tpu": {"xla_allow_excess_precision": False},
}


@dataclass(frozen=True)
class Programs:
    """A model's compiled programs.

    Attributes:
        config: The decoder's configuration.
        trunks: From parameters, tokens, segments and positions to hidden states in chunks
            `[CHUNK * data-parallel size, d]`; chunk `j` holds an equal run of every row.
        heads: From parameters, a chunk and the tokens that follow to an output.
    """

    config: ModelConfig
    trunks: Mapping[Bucket, Compiled]
    heads: Mapping[str, Compiled]

    def run(
        self, params: Mapping[str, jax.Array], batch: Batch, outputs: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The outputs after every real token of a batch, rows in order."""
        rows, length = batch.tokens.shape
        trunk_params, head_params = split_params(params, self.config)
        chunks = self.trunks[Bucket(length, rows)](
            trunk_params, batch.tokens, batch.segments, batch.positions
        )
        following = np.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
        step = length // len(chunks)
        starts = np.concatenate([[0], np.cumsum(batch.lengths)])
        results = {
            name: np.empty((starts[-1], *OUTPUTS[name].width(self.config)), np.float32)
            for name in outputs
        }
        for first in range(0, max(batch.lengths), step):
            targets = following[:, first : first + step].reshape(-1)
            for name, result in results.items():
                values = np.asarray(self.heads[name](head_params, chunks[first // step], targets))
                values = values.reshape(rows, step, *result.shape[1:])
                for row, real in enumerate(batch.lengths):
                    count = min(step, real - first)
                    if count > 0:
                        at = starts[row] + first
                        result[at : at + count] = values[row, :count]
        return results


def compile_programs(
    plan: Plan[Any],
    compute_dtype: str,
    mesh: Mesh,
    buckets: Sequence[Bucket],
    monitor: LoadMonitor,
) -> Programs:
    """Compiles every program that a model will need. Needs no weights.

    Args:
        plan: The model.
        compute_dtype: Dtype of the arithmetic.
        mesh: The device mesh, axes Auto.
        buckets: The shapes to serve.
        monitor: Told of the programs of the stage `compile`.

    Raises:
        ModelError: LOAD_CANCELLED.
    """
    jobs: list[Bucket | str] = [*buckets, *served(plan.config)]
    monitor.expect("compile", len(jobs))

    def compiled(job: Bucket | str) -> Compiled:
        monitor.check()
        if isinstance(job, Bucket):
            lowered = lower_trunk(plan, compute_dtype, mesh, job)
        else:
            lowered = lower_head(plan, mesh, job)
        monitor.check()
        program = compile_lowered(lowered, mesh)
        monitor.advance("compile", 1)
        return program

    with ThreadPoolExecutor(_COMPILE_THREADS, "compile") as pool:
        programs = dict(zip(jobs, pool.map(compiled, jobs), strict=True))
    return Programs(
        plan.config,
        {key: program for key, program in programs.items() if isinstance(key, Bucket)},
        {key: program for key, program in programs.items() if isinstance(key, str)},
    )


def split_params(params: Mapping[str, T], config: ModelConfig) -> tuple[dict[str, T], dict[str, T]]:
    """The parameters that the trunk takes, and those that the head takes."""
    head = head_parameter(config)
    trunk_params = {k: v for k, v in params.items() if k not in ("head", "score")}
    return trunk_params, {head: params[head]}


def compile_lowered(lowered: jax.stages.Lowered, mesh: Mesh) -> Compiled:
    """Compiles with the options that the mesh's platform needs for exact numbers."""
    return lowered.compile(_COMPILER_OPTIONS.get(str(mesh.devices.flat[0].platform)))


def lower_trunk(
    plan: Plan[Any], compute_dtype: str, mesh: Mesh, bucket: Bucket
) -> jax.stages.Lowered:
    """The trunk's program for a bucket, from shapes alone."""
    config, dtype = plan.config, numpy_dtype(compute_dtype)
    by_rows = NamedSharding(mesh, PartitionSpec(FSDP if FSDP in mesh.shape else None))
    chunk = CHUNK * mesh.shape.get(FSDP, 1)
    step = chunk // bucket.rows

    def run(
        params: Mapping[str, jax.Array],
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, ...]:
        visible = Visibility(segments=segments)
        hidden = trunk(
            params, tokens, positions, visible, config=config, mesh=mesh, compute_dtype=dtype
        )
        return tuple(
            jax.lax.with_sharding_constraint(
                hidden[:, start : start + step].reshape(chunk, config.embed_dim), by_rows
            )
            for start in range(0, bucket.length, step)
        )

    ids = jax.ShapeDtypeStruct((bucket.rows, bucket.length), jnp.int32, sharding=by_rows)
    return jax.jit(run).lower(split_params(_abstract(plan, mesh), config)[0], ids, ids, ids)


def lower_head(plan: Plan[Any], mesh: Mesh, name: str) -> jax.stages.Lowered:
    """The head's program for an output, from shapes alone."""
    config = plan.config
    by_rows = NamedSharding(mesh, PartitionSpec(FSDP if FSDP in mesh.shape else None))
    chunk = CHUNK * mesh.shape.get(FSDP, 1)

    def run(params: Mapping[str, jax.Array], hidden: jax.Array, following: jax.Array) -> jax.Array:
        logits = logits_of(params, hidden[:, None], config=config, mesh=mesh)[:, 0]
        return OUTPUTS[name].compute(logits, following)

    hidden = jax.ShapeDtypeStruct((chunk, config.embed_dim), jnp.float32, sharding=by_rows)
    following = jax.ShapeDtypeStruct((chunk,), jnp.int32, sharding=by_rows)
    replicated = NamedSharding(mesh, PartitionSpec())
    lowering = jax.jit(run, out_shardings=replicated)
    return lowering.lower(split_params(_abstract(plan, mesh), config)[1], hidden, following)


def _abstract(plan: Plan[Any], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    sizes = dict(mesh.shape)
    return {
        parameter.name: jax.ShapeDtypeStruct(
            parameter.shape,
            numpy_dtype(parameter.dtype),
            sharding=NamedSharding(mesh, partition(parameter.spec(sizes))),
        )
        for parameter in plan.parameters
    }
