"""The plan of a load: every parameter matched, checked and sized before anything is read."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moorage_models.config import ModelConfig
from moorage_models.errors import ModelError, Reason
from moorage_models.families import FAMILIES, Family
from moorage_models.headers import ITEM_BYTES, StoredTensor
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


@dataclass(frozen=True)
class PlannedParameter:
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
    pieces: tuple[Piece, ...]

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
class Plan:
    """Everything that a load will do.

    Attributes:
        config: The configuration.
        parameters: The parameters, largest first.
        duplicates: Tensors that must hold the same bytes as a parameter: a tied head that is
            stored as well.
    """

    config: ModelConfig
    parameters: tuple[PlannedParameter, ...]
    duplicates: tuple[tuple[StoredTensor, str], ...] = ()

    @property
    def files(self) -> list[str]:
        """The files that are needed."""
        pieces = itertools.chain.from_iterable(p.pieces for p in self.parameters)
        return sorted({p.tensor.file for p in pieces} | {t.file for t, _ in self.duplicates})

    @property
    def stored_bytes(self) -> int:
        """Bytes to read."""
        return sum(piece.tensor.nbytes for p in self.parameters for piece in p.pieces)

    @property
    def dtype(self) -> str:
        """The dtype of most of the parameters' bytes."""
        totals: dict[str, int] = dict.fromkeys(_WIDTHS, 0)
        for parameter in self.parameters:
            totals[parameter.dtype] += math.prod(parameter.shape) * ITEM_BYTES[parameter.dtype]
        return max(totals, key=totals.__getitem__)

    def device_bytes(self, mesh: MeshShape) -> int:
        """Bytes of parameters on each device of a mesh."""
        return sum(parameter.device_bytes(mesh) for parameter in self.parameters)


def make_plan(config: ModelConfig, tensors: Mapping[str, StoredTensor], dtype: str = "") -> Plan:
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
    duplicates = _duplicates(config, named)
    misfits: list[str] = []
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
    return Plan(config, tuple(parameters), duplicates)


def _canonical(name: str, family: Family) -> str:
    for old, new in family.renames.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


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
        wanted = _fill(template, index)
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


def _fill(template: str, index: tuple[int, ...]) -> str:
    for mark, number in zip("*#", index, strict=False):
        template = template.replace(mark, str(number))
    return template


def _left_over(named: Mapping[str, StoredTensor], family: Family) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, tensor in named.items():
        if not any(tensor.name.startswith(i) or name.endswith(i) for i in family.ignorable):
            groups.setdefault(re.sub(r"\d+", "*", name), []).append(tensor.name)
    return [f"no parameter for tensor {_some(names)}" for names in groups.values()]


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more like it" if len(names) > 1 else "")


def _refuse_quantised(parameters: list[PlannedParameter]) -> None:
    for parameter in parameters:
        for piece in parameter.pieces:
            if piece.tensor.dtype not in ITEM_BYTES:
                raise ModelError(
                    Reason.CHECKPOINT_UNSUPPORTED,
                    f"tensor {piece.tensor.name} is stored as {piece.tensor.dtype}: quantised "
                    "weights cannot be run exactly; use the float checkpoint",
                )


def preset_plan(config: ModelConfig, dtype: str = "") -> Plan:
    """The sizes of a model that no checkpoint was looked into for; it has no tensors.

    Args:
        config: The configuration.
        dtype: Dtype of the parameters; empty for bfloat16, in which all presets are published.
    """
    parameters = tuple(
        PlannedParameter(name, shape, dtype or "bfloat16", ())
        for name, shape in parameter_shapes(config).items()
    )
    return Plan(config, parameters)
