"""The table of outputs. Adding an output is one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moorage_models.config import ModelConfig


@dataclass(frozen=True)
class Output:
    """One output of the head.

    Attributes:
        compute: From the logits after a run of tokens and the tokens that follow, the values.
        about_next: The value after token `t` is about token `t + 1` and is reported there; the
            first token of a segment then has NaN.
        width: Sizes of the axes after the token axis.
    """

    compute: Callable[[Float32[Array, "c v"], Int32[Array, " c"]], Float32[Array, ...]]
    about_next: bool
    width: Callable[[ModelConfig], tuple[int, ...]]


def _log_probability(
    logits: Float32[Array, "c v"], following: Int32[Array, " c"]
) -> Float32[Array, " c"]:
    chosen = jnp.take_along_axis(logits, following[:, None], axis=-1, mode="clip")[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _logits(logits: Float32[Array, "c v"], following: Int32[Array, " c"]) -> Float32[Array, "c v"]:
    del following
    return logits


OUTPUTS: Mapping[str, Output] = {
    "logprobs": Output(_log_probability, about_next=True, width=lambda config: ()),
    "logits": Output(
        _logits, about_next=False, width=lambda config: (config.num_labels or config.vocab_size,)
    ),
}


def served(config: ModelConfig) -> list[str]:
    """The outputs of one model: with a head of labels, there is no next token to speak of."""
    return [
        name for name, output in OUTPUTS.items() if not (config.num_labels and output.about_next)
    ]
