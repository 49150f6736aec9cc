"""An upper bound on what a model's programs take while they run, before they are compiled."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moorage_models.attention import QUERY_BLOCK
from moorage_models.config import ModelConfig
from moorage_models.parameters import LAYERS, PARAMETERS, axis_sizes
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
from moorage_server.engine.head import CHUNK, block_rows
from moorage_server.engine.outputs import PROFILES, Profile, served

_WIDE = 4  # bytes: a backend may compute in float32 whatever was asked for, and the CPU's does


def temporary_bytes(
    plan: Plan[Any],
    compute_dtype: str,
    mesh: MeshShape,
    buckets: Sequence[Bucket],
    platform: str = "",
    profiles: Collection[Profile] = PROFILES,
) -> int:
    """Bytes on each device that a forward pass takes beside the parameters, at the most.

    Those are the temporaries, results and other arguments of the largest program, and what stays
    from one program to the next: the trunk's result until the heads are done, and a head's chunk
    and result while it runs on the next one. Everything is counted as float32, and little as freed
    before its layer ends.

    The tests compare it with `memory_analysis()` of the programs as compiled for CPU: at the
    published sizes that they try it is at most three times as much. Some of these were compiled
    once for a TPU v5e, without the device: there it was 1.8 to 3.2 times as much. A TPU
    multiplies bfloat16 as it is, and frees more.

    Args:
        plan: The model.
        compute_dtype: Dtype of the arithmetic.
        mesh: Sizes of the mesh axes.
        buckets: The shapes that are served; at least one.
        platform: Of the devices; `cpu` and `tpu` are told apart, else the larger is counted.
        profiles: The programs of the head that may be served.
    """
    config = plan.config
    shares = {p.name: _share(p, config, mesh) for p in plan.parameters}
    result = max(_tokens(bucket, mesh) for bucket in buckets) * config.embed_dim
    activations = max(_activations(config, mesh, bucket, platform) for bucket in buckets)
    stacks = 0 if platform == "tpu" else _laid_anew(plan, compute_dtype, shares)
    trunk = _weights(shares) + stacks + activations
    return _WIDE * (result + max(trunk, _head(config, mesh, served(config, profiles))))


@dataclass(frozen=True)
class _Share:
    """One device's values of a parameter, or of one layer of a stack.

    Attributes:
        stored: As it is stored.
        used: As it is multiplied.
    """

    stored: int
    used: int

    @property
    def gathered(self) -> int:
        """What a gather takes and gives; 0 without one."""
        return self.stored + self.used if self.used > self.stored else 0

    @property
    def widened(self) -> int:
        """What a product takes beside the parameter itself."""
        return self.gathered or self.used


def _share(parameter: PlannedParameter[Any], config: ModelConfig, mesh: MeshShape) -> _Share:
    letters = PARAMETERS[parameter.name].axes.split()
    stacked = len(parameter.shape) - len(letters)
    stored = shard_shape(parameter.shape, parameter.spec(mesh), mesh)[stacked:]
    used = shard_shape(parameter.shape[stacked:], compute_spec(letters, config, mesh), mesh)
    return _Share(math.prod(stored), math.prod(used))


def _weights(shares: Mapping[str, _Share]) -> int:
    """A layer's weights, the largest twice, and the embedding table if it is gathered.

    Twice, because experts are copied, one parameter at a time, on their way to their own loop.
    Rows are taken from a table that lies where it is used without a copy of it.
    """
    layer = [share.widened for name, share in shares.items() if name.startswith(LAYERS)]
    return sum(layer) + max(layer) + shares["embed"].gathered


def _laid_anew(plan: Plan[Any], compute_dtype: str, shares: Mapping[str, _Share]) -> int:
    """Whole stacks that the CPU's compiler copies into another layout before the loop.

    It wants the axis that is gathered first. A stack that is cast in the loop stays as it is, and
    so does bfloat16, which is widened there.
    """
    return sum(
        shares[p.name].stored * p.shape[0]
        for p in plan.parameters
        if p.name.startswith(LAYERS)
        and shares[p.name].gathered
        and p.dtype == compute_dtype != "bfloat16"
    )


def _activations(config: ModelConfig, mesh: MeshShape, bucket: Bucket, platform: str) -> int:
    """What a layer holds of its tokens."""
    queries, keys, hidden = (_own(letter, config, mesh) for letter in "nkf")
    # The residual and its next value, a norm in both dtypes, a branch before and after its sum.
    stream = 6 * config.embed_dim
    # Queries, and keys and values repeated as often: projected, normed, rotated, moved; the means.
    heads = 8 * queries + 5 * keys
    # Scores, their exponentials and the weights, of one block of queries to each token as a key:
    # blocks run one after the other.
    scores = 3 * queries // config.head_dim * _block(bucket)
    feed = _experts(config, platform) if config.num_experts else 3 * hidden  # gate, up, product
    return _tokens(bucket, mesh) * (stream + max(heads + scores, feed))


def _experts(config: ModelConfig, platform: str) -> int:
    """What the experts hold of each token: see `moorage_models.moe`.

    Rows sent and brought back, gate, up and product of each, and the router's shares. On CPU the
    experts run one by one, and a token is one row.
    """
    rows = 1 if platform == "cpu" else config.experts_per_token
    return rows * (2 * config.embed_dim + 3 * config.expert_hidden_dim) + 3 * config.num_experts


def _head(
    config: ModelConfig,
    mesh: MeshShape,
    profiles: Collection[Profile],
) -> int:
    """A block of the head's table, and of a chunk its logits, hidden states, and two results.

    Every device has the results of all. The hidden states are those that are held, divided by
    their temperatures, and those of the chunk before.
    """
    outputs = config.num_labels or config.vocab_size
    result = max((_result(config, profile) for profile in profiles), default=0)
    found = max((profile.size for profile in profiles), default=0) * mesh.get(TP, 1)
    whole = mesh.get(FSDP, 1) * (3 * result + 2)  # gathered, returned, and still held from before
    split = 2 * outputs + 3 * config.embed_dim + 4 * min(found, outputs)
    rows = block_rows(_own("v", config, mesh), config.embed_dim)
    block = 3 * config.embed_dim * min(rows, outputs)
    return block + CHUNK * (whole + split)


def _result(config: ModelConfig, profile: Profile) -> int:
    """How many values a program of the head gives of a token."""
    tensors = profile.tensors(profile.outputs).values()
    return sum(math.prod(tensor.width(config, profile.size)) for tensor in tensors)


def _tokens(bucket: Bucket, mesh: MeshShape) -> int:
    """Tokens on each device, rows padded to whole blocks of queries."""
    block = _block(bucket)
    return bucket.rows // mesh.get(FSDP, 1) * -(-bucket.length // block) * block


def _block(bucket: Bucket) -> int:
    return min(QUERY_BLOCK, bucket.length)


def _own(letter: str, config: ModelConfig, mesh: MeshShape) -> int:
    """The size of an axis on each device while it is multiplied."""
    size = axis_sizes(config)[letter]
    return size // mesh[TP] if splits_over_tp(letter, config, mesh) else size
