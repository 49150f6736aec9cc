"""The plan of a load: every parameter matched, checked and sized before anything is read."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from moorage_models.config import ModelConfig
from moorage_models.dtypes import ITEM_BYTES, check_dtype
from moorage_models.errors import ModelError, Reason
from moorage_models.families import FAMILIES, Family
from moorage_models.headers import StoredTensor
from moorage_models.layouts import ArrayPiece, fill_template
from moorage_models.parameters import PARAMETERS, parameter_shapes
from moorage_models.sharding import MeshShape, Spec, shard_shape, storage_spec

#: Widest last: a stack whose layers are stored in several dtypes takes the widest, without loss.
_WIDTHS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Piece:
    """A stored tensor, and which slice of its parameter it is.

    Attributes:
        tensor: The stored tensor.
        index: Its place on the parameter's leading axes: (), (layer,) or (layer, expert).
    """

    tensor: StoredTensor
    index: tuple[int, ...]


#: How a plan's bytes are stored: as safetensors or in an Orbax tree.
P = TypeVar("P", Piece, ArrayPiece)


@dataclass(frozen=True)
class PlannedParameter(Generic[P]):
    """One parameter and where all of it comes from.

    Attributes:
        name: The parameter's name.
        shape: Its shape, stacked.
        dtype: numpy name of its dtype in device memory.
        pieces: Its slices; together they cover it once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[P, ...]

    def spec(self, mesh: MeshShape) -> Spec:
        """How it is split in device memory; never over the layers."""
        axes = PARAMETERS[self.name].axes
        stacked = self.shape[: len(self.shape) - len(axes.split())]
        return ((),) * len(stacked) + storage_spec(axes, self.shape[len(stacked) :], mesh)

    def device_bytes(self, mesh: MeshShape) -> int:
        """Bytes on each device."""
        shape = shard_shape(self.shape, self.spec(mesh), mesh)
        return math.prod(shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Plan(Generic[P]):
    """Everything that a load will do.

    Attributes:
        config: The configuration.
        parameters: The parameters, largest first.
        files: The files that are needed.
        duplicates: Tensors that must hold the same bytes as a parameter: a tied head that is
            stored as well.
    """

    config: ModelConfig
    parameters: tuple[PlannedParameter[P], ...]
    files: tuple[str, ...] = ()
    duplicates: tuple[tuple[StoredTensor, str], ...] = ()

    @property
    def dtype(self) -> str:
        """The dtype of most of the parameters' bytes."""
        sizes = ((p.dtype, math.prod(p.shape) * ITEM_BYTES[p.dtype]) for p in self.parameters)
        return most_bytes(sizes)

    def device_bytes(self, mesh: MeshShape) -> int:
        """Bytes of parameters on each device of a mesh."""
        return sum(parameter.device_bytes(mesh) for parameter in self.parameters)


def make_plan(
    config: ModelConfig, tensors: Mapping[str, StoredTensor], dtype: str = ""
) -> Plan[Piece]:
    """Matches every parameter of `config` with stored tensors.

    Args:
        config: The configuration.
        tensors: What the checkpoint holds.
        dtype: Dtype of the parameters; empty keeps what is stored.

    Raises:
        ModelError: CHECKPOINT_MISMATCH with every misfit: a parameter without a tensor, a tensor
            of another shape, a tensor left over. CHECKPOINT_UNSUPPORTED for quantised tensors.
    """
    family = FAMILIES[config.family]
    named = {_canonical(name, family): tensor for name, tensor in tensors.items()}
    twins = [n for n, tensor in tensors.items() if named[_canonical(n, family)] is not tensor]
    misfits = [f"stored under two names: {_some(twins)}"] if twins else []
    _separate_experts(config, family, named)
    duplicates = _duplicates(config, named)
    parameters = []
    for name, shape in parameter_shapes(config).items():
        pieces = tuple(_pieces(name, shape, family.tensors[name], named, misfits))
        dtypes = {piece.tensor.dtype for piece in pieces}
        stored = max(dtypes & set(_WIDTHS), key=_WIDTHS.index, default="float32")
        if len(dtypes) > 1 and dtypes == {"bfloat16", "float16"}:
            stored = "float32"  # neither holds the other
        parameters.append(PlannedParameter(name, shape, dtype or stored, pieces))
    misfits += _left_over(named, family)
    if misfits:
        raise ModelError(
            Reason.CHECKPOINT_MISMATCH,
            f"the checkpoint does not fit the {config.family} config:\n" + "\n".join(misfits),
        )
    _refuse_quantised(parameters)
    parameters.sort(key=lambda p: -math.prod(p.shape))
    files = {piece.tensor.file for p in parameters for piece in p.pieces}
    files |= {tensor.file for tensor, _ in duplicates}
    return Plan(config, tuple(parameters), tuple(sorted(files)), duplicates)


def most_bytes(sizes: Iterable[tuple[str, int]]) -> str:
    """The dtype that most bytes have, of pairs of a dtype and bytes."""
    totals: dict[str, int] = dict.fromkeys(_WIDTHS, 0)
    for dtype, nbytes in sizes:
        totals[dtype] += nbytes
    return max(totals, key=totals.__getitem__)


def _canonical(name: str, family: Family) -> str:
    for old, new in family.renames.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _separate_experts(config: ModelConfig, family: Family, named: dict[str, StoredTensor]) -> None:
    """Replaces tensors `[experts, parts * out, in]` by runs of bytes, one a part and expert."""
    for layer, (fused, parts) in itertools.product(range(config.num_layers), family.fused.items()):
        tensor = named.get(fill_template(fused, (layer,)))
        if tensor is None or not _holds_experts(tensor, config.num_experts, len(parts)):
            continue
        del named[fill_template(fused, (layer,))]
        shape = (tensor.shape[1] // len(parts), tensor.shape[2])
        offset = tensor.offset
        for expert, part in itertools.product(range(config.num_experts), parts):
            piece = replace(tensor, shape=shape, offset=offset)
            named[fill_template(part, (layer, expert))] = piece
            offset += piece.nbytes


def _holds_experts(tensor: StoredTensor, experts: int, parts: int) -> bool:
    shape = tensor.shape
    fits = len(shape) == 3 and shape[0] == experts and shape[1] % parts == 0
    return fits and tensor.dtype in ITEM_BYTES


def _duplicates(
    config: ModelConfig, named: dict[str, StoredTensor]
) -> tuple[tuple[StoredTensor, str], ...]:
    """Takes a tied head that is stored as well out of `named`."""
    head = FAMILIES[config.family].tensors["head"]
    if config.tied and head in named:
        return ((named.pop(head), "embed"),)
    return ()


def _pieces(
    name: str,
    shape: tuple[int, ...],
    template: str,
    named: dict[str, StoredTensor],
    misfits: list[str],
) -> Iterator[Piece]:
    """Takes a parameter's tensors out of `named`; misfits are told once a parameter."""
    leading = template.count("*") + template.count("#")
    missing, wrong = [], {}
    for index in itertools.product(*(range(size) for size in shape[:leading])):
        wanted = fill_template(template, index)
        tensor = named.pop(wanted, None)
        if tensor is None:
            missing.append(wanted)
        elif tensor.shape != shape[leading:]:
            wrong[wanted] = tensor.shape
        else:
            yield Piece(tensor, index)
    if missing:
        misfits.append(f"{name}: no tensor {_some(missing)}")
    if wanted := next(iter(wrong), ""):
        expected = list(shape[leading:])
        misfits.append(
            f"{name}: {_some(list(wrong))} has shape {list(wrong[wanted])}, wanted {expected}"
        )


def _left_over(named: Mapping[str, StoredTensor], family: Family) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, tensor in named.items():
        if not any(tensor.name.startswith(i) or name.endswith(i) for i in family.ignorable):
            groups.setdefault(re.sub(r"\d+", "*", name), []).append(tensor.name)
    return [f"no parameter for tensor {_some(names)}" for names in groups.values()]


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more like it" if len(names) > 1 else "")


def _refuse_quantised(parameters: list[PlannedParameter[Piece]]) -> None:
    for parameter in parameters:
        for piece in parameter.pieces:
            if piece.tensor.dtype not in ITEM_BYTES:
                raise ModelError(
                    Reason.CHECKPOINT_UNSUPPORTED,
                    f"tensor {piece.tensor.name} is stored as {piece.tensor.dtype}: quantised "
                    "weights cannot be run exactly; use the float checkpoint",
                )


def preset_plan(config: ModelConfig, dtype: str = "") -> Plan[Piece]:
    """The sizes of a model that no checkpoint was looked into for; it has no tensors.

    Args:
        config: The configuration.
        dtype: Dtype of the parameters; empty for bfloat16, in which all presets are published.

    Raises:
        ModelError: INVALID_REQUEST for a dtype that parameters cannot have.
    """
    check_dtype(dtype)
    parameters = tuple(
        PlannedParameter[Piece](name, shape, dtype or "bfloat16", ())
        for name, shape in parameter_shapes(config).items()
    )
    return Plan(config, parameters)
