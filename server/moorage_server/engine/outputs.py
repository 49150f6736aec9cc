"""The tables of outputs and of the programs that compute them.

Adding an output is one entry in `OUTPUTS`, and its name in a profile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float32, Int32

from moorage_models.config import ModelConfig
from moorage_models.sharding import TP


class About(Enum):
    """What a value of an output is about, and so where it is reported."""

    TOKEN = "token"  # a token, given those before it: it comes from the token before
    AFTER = "after"  # what the model says after a token; callers may choose which
    END = "end"  # the same, after the last token of each segment unless the caller chose


class Logits(NamedTuple):
    """What a run of tokens says, and what is asked of it; `s` data-parallel devices, `c` tokens.

    Attributes:
        values: The logits, divided by each token's temperature.
        largest: The largest of them.
        log_sum: The logarithm of the sum of `exp(values - largest)`: at least 0.
        targets: The token that is asked about.
        candidates: The tokens that are asked about beside it; `n` may be 0.
        size: How many tokens a top-k gives; at most `v`.
        layout: How the values lie on the mesh.
    """

    values: Float32[Array, "s c v"]
    largest: Float32[Array, "s c 1"]
    log_sum: Float32[Array, "s c"]
    targets: Int32[Array, "s c"]
    candidates: Int32[Array, "s c n"]
    size: int
    layout: NamedSharding

    @classmethod
    def of(
        cls,
        values: Float32[Array, "s c v"],
        targets: Int32[Array, "s c"],
        candidates: Int32[Array, "s c n"],
        size: int,
        layout: NamedSharding,
    ) -> Logits:
        """Sums over the vocabulary."""
        largest = jnp.max(values, axis=-1, keepdims=True)
        log_sum = jnp.log(jnp.sum(jnp.exp(values - largest), axis=-1))
        return cls(values, largest, log_sum, targets, candidates, size, layout)

    def logprobs(self, values: Float32[Array, "s c n"]) -> Float32[Array, "s c n"]:
        """Log-probabilities of tokens by their logits.

        The largest logit is taken off first: it may be large, and so is the rounding of its sum
        with anything else.
        """
        return values - self.largest - jnp.expand_dims(self.log_sum, 2)


@dataclass(frozen=True)
class Tensor:
    """One tensor of an output.

    Attributes:
        width: Sizes of the axes after the token axis, for a config and the asked number of tokens.
        dtype: Its dtype.
    """

    width: Callable[[ModelConfig, int], tuple[int, ...]]
    dtype: str = "float32"


@dataclass(frozen=True)
class Output:
    """One output.

    Attributes:
        about: Which tokens it has values for.
        tensors: What it consists of.
        compute: The tensors' values, each `[s, c, ...]`, from the logits; None for the hidden
            states themselves.
        reads_labels: Whether it is of a model whose head gives labels, or of one with a vocabulary;
            None for both.
    """

    about: About
    tensors: Mapping[str, Tensor]
    compute: Callable[[Logits], tuple[Array, ...]] | None
    reads_labels: bool | None = False


@dataclass(frozen=True)
class Profile:
    """A program of the head.

    Attributes:
        outputs: What it computes; those of one profile are about the same tokens.
        size: The largest top-k, or number of candidates; smaller ones are padded up.
    """

    outputs: tuple[str, ...]
    size: int = 0

    @property
    def name(self) -> str:
        """Its name, as people read it."""
        return "+".join(self.outputs) + (f"@{self.size}" if self.size else "")

    def tensors(self, outputs: Collection[str]) -> dict[str, Tensor]:
        """The tensors of those of its outputs that are wanted."""
        found: dict[str, Tensor] = {}
        for name in self.outputs:
            found |= OUTPUTS[name].tensors if name in outputs else {}
        return found

    @property
    def candidates(self) -> int:
        """How many candidates it takes."""
        return self.size if "candidates" in self.outputs else 0

    @property
    def about(self) -> About:
        """Which tokens it has values for."""
        return OUTPUTS[self.outputs[0]].about


def _of_target(logits: Logits) -> tuple[Array, ...]:
    return (jnp.squeeze(_of(logits, jnp.expand_dims(logits.targets, 2)), 2),)


def _of(logits: Logits, ids: Int32[Array, "s c n"]) -> Float32[Array, "s c n"]:
    """Log-probabilities of tokens by their ids."""
    return logits.logprobs(jnp.take_along_axis(logits.values, ids, axis=-1, mode="clip"))


def _entropy(logits: Logits) -> tuple[Array, ...]:
    """`log Z - sum p z`, in nats, of logits `z <= 0` below the largest: neither part is negative.

    They are found anew: those of `log_sum` the compiler would hold, as large as the logits.
    """
    below = logits.values - jax.lax.optimization_barrier(logits.largest)
    weights = jnp.exp(below - jnp.expand_dims(logits.log_sum, 2))
    return (logits.log_sum - jnp.sum(weights * below, axis=-1),)


def _top_k(logits: Logits) -> tuple[Array, ...]:
    """The largest, the first of equals first; each device searches its own part of them.

    That is stated: the partitioner would bring all logits to every device.
    """
    mesh, spec = logits.layout.mesh, logits.layout.spec

    def own(values: Float32[Array, "s c v"]) -> tuple[Array, Array]:
        flat = values.reshape(-1, values.shape[-1])
        best, ids = jax.lax.top_k(flat, min(logits.size, flat.shape[-1]))
        return best.reshape(*values.shape[:2], -1), ids.reshape(*values.shape[:2], -1)

    values, ids = jax.shard_map(own, mesh=mesh, in_specs=spec, out_specs=spec)(logits.values)
    parts = mesh.shape[TP] if TP in spec else 1
    part = logits.values.shape[-1] // parts
    ids = ids + jnp.repeat(jnp.arange(parts, dtype=jnp.int32) * part, ids.shape[-1] // parts)
    values, order = jax.lax.top_k(values, logits.size)
    return jnp.take_along_axis(ids, order, axis=-1), logits.logprobs(values)


def _scalar(config: ModelConfig, size: int) -> tuple[int, ...]:
    return ()


def _sized(config: ModelConfig, size: int) -> tuple[int, ...]:
    return (min(size, config.vocab_size),)


OUTPUTS: Mapping[str, Output] = {
    "logprobs": Output(About.TOKEN, {"logprobs": Tensor(_scalar)}, _of_target),
    "entropy": Output(About.TOKEN, {"entropy": Tensor(_scalar)}, _entropy),
    "top_k": Output(
        About.TOKEN,
        {"top_k_ids": Tensor(_sized, "int32"), "top_k_logprobs": Tensor(_sized)},
        _top_k,
    ),
    "candidates": Output(
        About.TOKEN,
        {"candidates": Tensor(lambda config, size: (size,))},
        lambda logits: (_of(logits, logits.candidates),),
    ),
    "logits": Output(
        About.AFTER,
        {"logits": Tensor(lambda config, size: (config.vocab_size,))},
        lambda logits: (logits.values,),
    ),
    "score": Output(
        About.END,
        {"score": Tensor(lambda config, size: (config.num_labels,))},
        lambda logits: (logits.values,),
        reads_labels=True,
    ),
    "hidden": Output(
        About.AFTER,
        {"hidden": Tensor(lambda config, size: (config.embed_dim,))},
        None,
        reads_labels=None,
    ),
}

#: The programs that are compiled; of those that would do, the first is taken.
PROFILES: tuple[Profile, ...] = (
    Profile(("logprobs",)),
    Profile(("logprobs", "entropy")),
    *(Profile(("logprobs", "entropy", "top_k"), size) for size in (8, 32, 128)),
    *(Profile(("logprobs", "entropy", "candidates"), size) for size in (8, 64, 512)),
    Profile(("logits",)),
    Profile(("score",)),
    Profile(("hidden",)),
)


def served(config: ModelConfig, profiles: Collection[Profile] = PROFILES) -> tuple[Profile, ...]:
    """The programs of one model: those that fit its head."""
    has_labels = bool(config.num_labels)
    return tuple(
        profile
        for profile in profiles
        if OUTPUTS[profile.outputs[0]].reads_labels in (None, has_labels)
    )


def choose(
    outputs: Collection[str], sizes: Mapping[str, int], profiles: Collection[Profile]
) -> dict[Profile, tuple[str, ...]] | None:
    """The programs to run for some outputs, with what is taken of each; None if there are none.

    Args:
        outputs: Names of outputs.
        sizes: The asked top-k and number of candidates, by output.
        profiles: The programs that there are.
    """
    left = set(outputs)
    chosen: dict[Profile, tuple[str, ...]] = {}
    for leading in reversed(list(OUTPUTS)):  # a profile is there for the last of its outputs
        if leading in left:
            size = sizes.get(leading, 0)
            fitting = (p for p in profiles if p.outputs[-1] == leading and p.size >= size)
            if (profile := next(fitting, None)) is None:
                return None
            chosen[profile] = tuple(name for name in profile.outputs if name in left)
            left -= set(profile.outputs)
    return None if left else chosen
