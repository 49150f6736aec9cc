"""An upper bound on what a model's programs take while they run, before they are compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moorage_models.attention import QUERY_BLOCK
from moorage_models.parameters import LAYERS, PARAMETERS
from moorage_models.plan import Plan, PlannedParameter
from moorage_models.sharding import FSDP, TP, TP_LETTERS, MeshShape
from moorage_server.engine.api import Bucket
from moorage_server.engine.programs import CHUNK

_WIDE = 4  # bytes: norms, softmax and what a backend computes in float32 whatever was asked for


def temporary_bytes(
    plan: Plan[Any], compute_dtype: str, mesh: MeshShape, buckets: Sequence[Bucket]
) -> int:
    """Bytes on each device that the largest of a model's programs takes beside the parameters.

    Every value of a layer is counted as float32 and as if nothing were freed, so the compiler's own
    figure, which is known only later, is below it; the tests compare the two.

    Args:
        plan: The model.
        compute_dtype: Dtype of the arithmetic.
        mesh: Sizes of the mesh axes.
        buckets: The shapes that are served.
    """
    trunk = max(_trunk_values(plan, mesh, bucket) for bucket in buckets)
    return _WIDE * max(trunk, _head_values(plan, mesh))


def _trunk_values(plan: Plan[Any], mesh: MeshShape, bucket: Bucket) -> int:
    config, tp = plan.config, mesh.get(TP, 1)
    rows = bucket.rows // mesh.get(FSDP, 1)
    tokens = rows * bucket.length
    heads = _share(config.num_heads, tp)
    block = min(QUERY_BLOCK, bucket.length)
    stream = 10 * tokens * config.embed_dim
    attention = 8 * tokens * heads * config.head_dim + 3 * rows * heads * block * bucket.length
    experts = config.num_experts and tokens * (
        3 * config.experts_per_token * config.expert_hidden_dim + 4 * config.num_experts
    )
    feed_forward = 4 * tokens * _share(config.hidden_dim, tp) + experts
    gathered = [_gathered(p, tp) for p in plan.parameters if p.name.startswith(LAYERS)]
    embedding = next(_gathered(p, tp) for p in plan.parameters if p.name == "embed")
    return stream + attention + feed_forward + 2 * sum(gathered) // config.num_layers + embedding


def _head_values(plan: Plan[Any], mesh: MeshShape) -> int:
    config, tp = plan.config, mesh.get(TP, 1)
    outputs = config.num_labels or config.vocab_size
    return CHUNK * (6 * outputs + 4 * config.embed_dim) + 2 * outputs * config.embed_dim // (
        tp if outputs % tp == 0 else 1
    )


def _gathered(parameter: PlannedParameter[Any], tp: int) -> int:
    """Values on each device of a parameter that is gathered over fsdp, all layers together."""
    axes = PARAMETERS[parameter.name].axes.split()
    split = any(
        letter in TP_LETTERS and size % tp == 0
        for letter, size in zip(axes, parameter.shape[-len(axes) :], strict=True)
    )
    return math.prod(parameter.shape) // (tp if split and len(axes) > 1 else 1)


def _share(count: int, tp: int) -> int:
    return count // tp if count % tp == 0 else count
