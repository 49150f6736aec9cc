"""How a parameter is laid over the mesh: data, and the two questions asked of it.

A parameter is *stored* split as finely as its axes divide: fsdp on the first axis as the
checkpoint stores it, so that a host's part is a few contiguous runs of the file, and tp on the
axes that tensor parallelism splits. It is *computed* with after an explicit gather over fsdp;
then tp splits whole heads, feed-forward columns or vocabulary rows only, and an axis whose units
do not divide is gathered whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moorage_models.config import ModelConfig

FSDP, TP = "fsdp", "tp"

MeshShape = Mapping[str, int]
#: For each array axis, the mesh axes that split it, outermost first.
Spec = tuple[tuple[str, ...], ...]

#: Letters (see `parameters`) that tensor parallelism splits.
TP_LETTERS = frozenset("nkfvme")

_FIRST_AXIS: dict[bool, tuple[tuple[str, ...], ...]] = {
    True: ((TP, FSDP), (TP,), (FSDP,)),
    False: ((FSDP,),),
}


def storage_spec(axes: str, shape: tuple[int, ...], mesh: MeshShape) -> Spec:
    """How a parameter is split in device memory.

    Args:
        axes: The letters of its axes, without the stacking axis.
        shape: The sizes of those axes.
        mesh: Sizes of the mesh axes.

    Returns:
        One entry an axis. Each takes the first of its choices whose mesh axes are still free and
        divide it; vectors, and axes that nothing divides, are replicated.
    """
    letters = axes.split()
    if len(letters) == 1:
        return ((),)
    used: set[str] = set()
    spec = []
    for position, (letter, size) in enumerate(zip(letters, shape, strict=True)):
        if position == 0:
            choices = _FIRST_AXIS[letter in TP_LETTERS]
        else:
            choices = ((TP,),) if letter in TP_LETTERS else ()
        split = next((c for c in choices if _splits(c, size, mesh) and not used & set(c)), ())
        used |= set(split)
        spec.append(split)
    return tuple(spec)


def _splits(mesh_axes: tuple[str, ...], size: int, mesh: MeshShape) -> bool:
    ways = math.prod(mesh.get(axis, 1) for axis in mesh_axes)
    return all(mesh.get(axis, 1) > 1 for axis in mesh_axes) and size % ways == 0


def compute_spec(letters: Sequence[str], config: ModelConfig, mesh: MeshShape) -> Spec:
    """How a parameter is split while it is multiplied: gathered over fsdp, tp on whole units."""
    return tuple((TP,) if splits_over_tp(x, config, mesh) else () for x in letters)


def splits_over_tp(letter: str, config: ModelConfig, mesh: MeshShape) -> bool:
    """Whether tensor parallelism splits this axis in arithmetic.

    Heads are split whole. Key and value heads follow the query heads: where they do not divide
    themselves, they are repeated (see `attention.repeat_heads`).
    """
    tp = mesh.get(TP, 1)
    units = {
        "n": config.num_heads,
        "k": config.num_kv_heads if config.num_heads % tp == 0 else 1,
        "f": config.hidden_dim,
        "v": config.vocab_size,
        "e": config.num_experts,
        "m": config.expert_hidden_dim if config.num_experts % tp else 1,  # whole experts first
    }
    return tp > 1 and letter in units and units[letter] % tp == 0


def shard_shape(shape: tuple[int, ...], spec: Spec, mesh: MeshShape) -> tuple[int, ...]:
    """The shape of the part that one device holds."""
    return tuple(
        size // math.prod(mesh.get(axis, 1) for axis in split)
        for size, split in zip(shape, spec, strict=True)
    )
