"""The compiled programs of a model: a trunk and a gather for each bucket, a head for each profile.

They are compiled ahead of time, from shapes alone, and take the weights as arguments. A call
never compiles.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled
from jax.typing import DTypeLike

from moorage_models.attention import Visibility
from moorage_models.config import ModelConfig
from moorage_models.decoder import trunk
from moorage_models.dtypes import numpy_dtype
from moorage_models.monitor import LoadMonitor
from moorage_models.ops import partition
from moorage_models.parameters import head_parameter
from moorage_models.plan import Plan
from moorage_models.sharding import FSDP
from moorage_server.engine.api import Answers, Batch, Bucket, Question
from moorage_server.engine.chunks import Chunk, chunks
from moorage_server.engine.head import CHUNK, head
from moorage_server.engine.outputs import Profile

_COMPILE_THREADS = 2

T = TypeVar("T")

#: Rows must not change with their neighbours or their bucket. Without the first, those of bfloat16
#: do. The second keeps XLA's CPU compiler from converting a whole bfloat16 stack to float32 ahead
#: of the loop over layers.
_COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    "cpu": {
        "xla_allow_excess_precision": False,
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    },
    "tpu": {"xla_allow_excess_precision": False},
}

#: Trunks come in several shapes. XLA's YNN library adds up the squares of a head in another order
#: in another shape (seen in models that norm queries and keys): it is kept to products. The heads
#: have one shape, and take less memory with it.
_TRUNK_OPTIONS: dict[str, dict[str, str | bool]] = _COMPILER_OPTIONS | {
    "cpu": _COMPILER_OPTIONS["cpu"]
    | {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
}


@dataclass(frozen=True)
class Programs:
    """A model's compiled programs.

    Attributes:
        config: The decoder's configuration.
        devices: Over how many devices rows are split.
        trunks: From parameters, tokens, segments, positions and depth to hidden states
            `[rows, length, d]`.
        gathers: From hidden states and the indices of a chunk to its hidden states.
        heads: From parameters, the hidden states of a chunk and what is asked of them to tensors:
            see `moorage_server.engine.head`.
    """

    config: ModelConfig
    devices: int
    trunks: Mapping[Bucket, Compiled]
    gathers: Mapping[Bucket, Compiled]
    heads: Mapping[Profile, Compiled]

    def run(
        self, params: Mapping[str, jax.Array], batch: Batch, questions: Sequence[Question]
    ) -> Answers:
        """Answers all questions about one batch."""
        begin = time.perf_counter()
        hidden, head_params = self.hidden(params, batch), split_params(params, self.config)[1]
        transfer, tensors = 0.0, []
        for question in questions:
            found, seconds = self._answer(question, hidden, batch.bucket, head_params)
            tensors.append(found)
            transfer += seconds
        return Answers(tuple(tensors), time.perf_counter() - begin - transfer, transfer)

    def hidden(self, params: Mapping[str, jax.Array], batch: Batch) -> jax.Array:
        """The trunk's result for one batch, `[rows, length, d]`."""
        depth = np.int32(self.config.num_layers if batch.depth is None else batch.depth)
        own = split_params(params, self.config)[0]
        trunk = self.trunks[batch.bucket]
        found: jax.Array = trunk(own, batch.tokens, batch.segments, batch.positions, depth)
        return found

    def _answer(
        self,
        question: Question,
        hidden: jax.Array,
        bucket: Bucket,
        head_params: Mapping[str, jax.Array],
    ) -> tuple[dict[str, np.ndarray], float]:
        """One question's tensors, and how long it took to bring them to the host.

        While a chunk is brought, the next one is computed.
        """
        profile, count = question.profile, len(question.after)
        results = {
            name: np.empty((count, *tensor.width(self.config, profile.size)), tensor.dtype)
            for name, tensor in profile.tensors(profile.outputs).items()
        }
        seconds = 0.0
        running: tuple[Chunk, dict[str, jax.Array]] | None = None
        for chunk in [*chunks(question, bucket, self.devices), None]:
            before, running = running, None
            if chunk:
                states = self.gathers[bucket](hidden, chunk.after)
                asked = (chunk.targets, chunk.temperatures, chunk.candidates)
                running = (chunk, self.heads[profile](head_params, states, *asked))
            if before:
                seconds += _fetch(*before, results)
        return results, seconds


def _fetch(
    chunk: Chunk, values: Mapping[str, jax.Array], results: Mapping[str, np.ndarray]
) -> float:
    """Copies a chunk's values to the results; gives the seconds that this took."""
    jax.block_until_ready(values)
    begin = time.perf_counter()
    chunk.put({name: np.asarray(values[name]) for name in results}, results)
    return time.perf_counter() - begin


def compile_programs(
    plan: Plan[Any],
    compute_dtype: str,
    mesh: Mesh,
    buckets: Sequence[Bucket],
    profiles: Sequence[Profile],
    monitor: LoadMonitor,
) -> Programs:
    """Compiles every program that a model will need. Needs no weights.

    Args:
        plan: The model.
        compute_dtype: Dtype of the arithmetic.
        mesh: The device mesh, axes Auto.
        buckets: The shapes to serve.
        profiles: The programs of the head.
        monitor: Told of the programs of the stage `compile`.

    Raises:
        ModelError: LOAD_CANCELLED.
    """
    trunks = [partial(lower_trunk, plan, compute_dtype, mesh, bucket) for bucket in buckets]
    gathers = [partial(lower_gather, plan, mesh, bucket) for bucket in buckets]
    heads = [partial(lower_head, plan, mesh, profile) for profile in profiles]
    monitor.expect("compile", len(trunks) + len(gathers) + len(heads))

    def lowered() -> Iterator[tuple[jax.stages.Lowered, bool]]:
        for lower in [*trunks, *gathers, *heads]:
            monitor.check()
            yield lower(), lower in trunks

    def compiled(program: tuple[jax.stages.Lowered, bool]) -> Compiled:
        monitor.check()
        result = compile_lowered(program[0], mesh, is_trunk=program[1])
        monitor.advance("compile", 1)
        return result

    with ThreadPoolExecutor(_COMPILE_THREADS, "compile") as pool:
        programs = list(pool.map(compiled, lowered()))  # lowered one after another, in this thread
    count = len(buckets)
    return Programs(
        plan.config,
        mesh.shape.get(FSDP, 1),
        dict(zip(buckets, programs[:count], strict=True)),
        dict(zip(buckets, programs[count : 2 * count], strict=True)),
        dict(zip(profiles, programs[2 * count :], strict=True)),
    )


def split_params(params: Mapping[str, T], config: ModelConfig) -> tuple[dict[str, T], dict[str, T]]:
    """The parameters that the trunk takes, and those that the head takes."""
    head = head_parameter(config)
    trunk_params = {k: v for k, v in params.items() if k not in ("head", "score")}
    return trunk_params, {head: params[head]}


def compile_lowered(lowered: jax.stages.Lowered, mesh: Mesh, *, is_trunk: bool = False) -> Compiled:
    """Compiles with the options that the mesh's platform needs for exact numbers."""
    options = _TRUNK_OPTIONS if is_trunk else _COMPILER_OPTIONS
    return lowered.compile(options.get(str(mesh.devices.flat[0].platform)))


def lower_trunk(
    plan: Plan[Any], compute_dtype: str, mesh: Mesh, bucket: Bucket
) -> jax.stages.Lowered:
    """The trunk's program for a bucket, from shapes alone."""
    config, by_rows = plan.config, _by_rows(mesh)

    def run(
        params: Mapping[str, jax.Array],
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        depth: jax.Array,
    ) -> jax.Array:
        return trunk(
            params,
            tokens,
            positions,
            Visibility(segments=segments),
            config=config,
            mesh=mesh,
            compute_dtype=numpy_dtype(compute_dtype),
            depth=depth,
        )

    ids = jax.ShapeDtypeStruct((bucket.rows, bucket.length), jnp.int32, sharding=by_rows)
    depth = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    params = split_params(_abstract(plan, mesh), config)[0]
    return jax.jit(run, out_shardings=by_rows).lower(params, ids, ids, ids, depth)


def lower_gather(plan: Plan[Any], mesh: Mesh, bucket: Bucket) -> jax.stages.Lowered:
    """The program that takes a chunk out of a batch; each device takes of its own rows."""
    by_rows, devices = _by_rows(mesh), mesh.shape.get(FSDP, 1)

    @partial(jax.shard_map, mesh=mesh, in_specs=by_rows.spec, out_specs=by_rows.spec)
    def run(hidden: jax.Array, after: jax.Array) -> jax.Array:
        return jnp.take(hidden.reshape(-1, hidden.shape[-1]), after, axis=0, mode="clip")

    shape = (bucket.rows, bucket.length, plan.config.embed_dim)
    hidden = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=by_rows)
    after = jax.ShapeDtypeStruct((devices, CHUNK), jnp.int32, sharding=by_rows)
    return jax.jit(run).lower(hidden, after)


def lower_head(plan: Plan[Any], mesh: Mesh, profile: Profile) -> jax.stages.Lowered:
    """The head's program for a profile, from shapes alone."""
    shape = (mesh.shape.get(FSDP, 1), CHUNK)

    def struct(dtype: DTypeLike, *width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, *width), dtype, sharding=_by_rows(mesh))

    run = partial(head, profile=profile, config=plan.config, mesh=mesh)
    lowering = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lowering.lower(
        split_params(_abstract(plan, mesh), plan.config)[1],
        struct(jnp.float32, plan.config.embed_dim),
        struct(jnp.int32),
        struct(jnp.float32),
        struct(jnp.int32, profile.candidates),
    )


def _by_rows(mesh: Mesh) -> NamedSharding:
    """The layout of what is split over data-parallel devices along its first axis."""
    return NamedSharding(mesh, PartitionSpec(FSDP if FSDP in mesh.shape else None))


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
