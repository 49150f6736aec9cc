"""An upper bound on what a model's programs take while they run, before they are compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moorage_models.attention import QUERY_BLOCK
from moorage_models.config import ModelConfig
from moorage_models.parameters import LAYERS, PARAMETERS, axis_sizes, head_parameter
from moorage_models.plan import Plan, PlannedParameter
from moorage_models.sharding import (
    FSDP,
    TP,
    MeshShape,
    compute_spec,
    shard_shape,
    splits_over_tp,
)
from moorage_server.engine.api import Bucket
from moorage_server.engine.programs import CHUNK

_WIDE = 4  # bytes: a backend may compute in float32 whatever was asked for, and the CPU's does


def temporary_bytes(
    plan: Plan[Any],
    compute_dtype: str,
    mesh: MeshShape,
    buckets: Sequence[Bucket],
    platform: str = "tpu",
) -> int:
    """Bytes on each device that a forward pass takes beside the parameters, at the most.

    That is the temporaries, results and other arguments of the largest program, and what is kept
    from one program to the next: the trunk's chunks until the heads are done, and a head's result
    while the next one runs. Values are counted as float32, and as if little of a layer were freed
    before its end.

    The tests compare it with `memory_analysis()` of programs compiled for CPU, where models of
    published sizes take a third of it or more. TPU programs, compiled for v5e without a device,
    were compared once: theirs took less than the bound, and mostly half as much as CPU's or less
    where weights are widened.

    Args:
        plan: The model.
        compute_dtype: Dtype of the arithmetic; none takes more than float32, which is counted.
        mesh: Sizes of the mesh axes.
        buckets: The shapes that are served; at least one.
        platform: Of the devices. On `cpu` experts take less; see `moorage_models.moe`.
    """
    chunks = max(_tokens(bucket, mesh) for bucket in buckets) * plan.config.embed_dim
    copies = 1 if platform == "cpu" else plan.config.experts_per_token
    trunk = _weight_values(plan, compute_dtype, mesh) + max(
        _tokens(bucket, mesh) * _token_values(plan.config, mesh, bucket, copies)
        for bucket in buckets
    )
    return _WIDE * (chunks + max(trunk, _head_values(plan, mesh)))


def _weight_values(plan: Plan[Any], compute_dtype: str, mesh: MeshShape) -> int:
    """One layer's weights, whole stacks that are copied, and the embedding table if gathered."""
    layer = [p for p in plan.parameters if p.name.startswith(LAYERS)]
    copied = [_copied(p, plan.config, mesh) for p in layer]
    stacks = sum(_stack_values(p, plan.config, compute_dtype, mesh) for p in layer)
    embed = _parameter(plan, "embed")
    table = _copied(embed, plan.config, mesh) if _is_gathered(embed, plan.config, mesh) else 0
    return sum(copied) + max(copied) + stacks + table  # the largest once more, on its way


def _stack_values(
    parameter: PlannedParameter[Any], config: ModelConfig, compute_dtype: str, mesh: MeshShape
) -> int:
    """Values of a stack that the CPU's compiler lays out anew for its gathers, before the loop.

    It does where a gather takes the stack's own values. bfloat16 is widened first, in the loop.
    """
    if parameter.dtype != compute_dtype or compute_dtype == "bfloat16":
        return 0
    stored, _ = _layouts(parameter, config, mesh)
    return stored * parameter.shape[0] if _is_gathered(parameter, config, mesh) else 0


def _token_values(config: ModelConfig, mesh: MeshShape, bucket: Bucket, copies: int) -> int:
    """What a layer holds for each token of the device.

    Args:
        config: The configuration.
        mesh: Sizes of the mesh axes.
        bucket: The shape.
        copies: Of each token, as rows for its experts.
    """
    queries, keys, hidden = (_own(letter, config, mesh) for letter in "nkf")
    # The residual and its next value, a norm in both dtypes, a branch before and after its sum.
    stream = 6 * config.embed_dim
    # Queries, and keys and values repeated as often: projected, normed, rotated, moved; the means.
    heads = 8 * queries + 5 * keys
    # Of one block of queries: scores, their exponentials and the weights. The blocks of a row
    # run one after the other, so a token has a share of one block's.
    scores = 3 * queries // config.head_dim * _block(bucket)
    if not config.num_experts:
        return stream + heads + scores + 3 * hidden  # gate, up, product
    # Rows sent to the experts and back, gate, up and product of each; the router's shares.
    rows = copies * (2 * config.embed_dim + 3 * config.expert_hidden_dim)
    return stream + heads + scores + rows + 3 * config.num_experts


def _head_values(plan: Plan[Any], mesh: MeshShape) -> int:
    """The head's weight, and logits of a chunk: split, and whole in this result and the last."""
    head = _parameter(plan, head_parameter(plan.config))
    outputs = head.shape[0]
    whole = 3 * mesh.get(FSDP, 1) * outputs  # gathered, returned, and still held from before
    split = 2 * outputs + 2 * plan.config.embed_dim
    return _copied(head, plan.config, mesh) + CHUNK * (whole + split)


def _copied(parameter: PlannedParameter[Any], config: ModelConfig, mesh: MeshShape) -> int:
    """Values of a parameter as it is multiplied, and of what is gathered if it is."""
    stored, used = _layouts(parameter, config, mesh)
    return stored + used if used > stored else used


def _is_gathered(parameter: PlannedParameter[Any], config: ModelConfig, mesh: MeshShape) -> bool:
    stored, used = _layouts(parameter, config, mesh)
    return used > stored


def _layouts(
    parameter: PlannedParameter[Any], config: ModelConfig, mesh: MeshShape
) -> tuple[int, int]:
    """Values on each device of one layer of a parameter: as stored, and as multiplied."""
    letters = PARAMETERS[parameter.name].axes.split()
    stacked = len(parameter.shape) - len(letters)
    stored = shard_shape(parameter.shape, parameter.spec(mesh), mesh)[stacked:]
    used = shard_shape(parameter.shape[stacked:], compute_spec(letters, config, mesh), mesh)
    return math.prod(stored), math.prod(used)


def _parameter(plan: Plan[Any], name: str) -> PlannedParameter[Any]:
    return next(p for p in plan.parameters if p.name == name)


def _tokens(bucket: Bucket, mesh: MeshShape) -> int:
    """Tokens on each device, padded to whole blocks of queries."""
    block = _block(bucket)
    return bucket.rows // mesh.get(FSDP, 1) * -(-bucket.length // block) * block


def _block(bucket: Bucket) -> int:
    return min(QUERY_BLOCK, bucket.length)


def _own(letter: str, config: ModelConfig, mesh: MeshShape) -> int:
    """The size of an axis on each device while it is multiplied."""
    size = axis_sizes(config)[letter]
    return size // mesh[TP] if splits_over_tp(letter, config, mesh) else size
