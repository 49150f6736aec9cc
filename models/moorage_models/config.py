"""The numbers and switches that tell one decoder from another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LOCAL, GLOBAL = "L", "G"


class _Presets(type):
    """Lets `ModelConfig.gemma2_2b()` build the preset of that id."""

    def __getattr__(cls, name: str) -> Callable[[], ModelConfig]:
        # `dataclass` asks for the fields' defaults before the families can be imported.
        if not name.startswith("_") and name not in cls.__annotations__:
            from moorage_models.naming import find_preset

            if preset := find_preset(name):
                return lambda: preset
        raise AttributeError(f"ModelConfig has no preset {name!r}")

    def __dir__(cls) -> list[str]:
        from moorage_models.families import PRESETS

        return [*super().__dir__(), *PRESETS]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the original context.

    Attributes:
        kind: `linear` divides every frequency by `factor`; `llama3` divides the low ones and
            blends between (Llama 3.1's published configuration and reference code).
        factor: The divisor.
        low_freq_factor: `llama3`: wavelengths above `original_max_position / low_freq_factor`
            are divided in full.
        high_freq_factor: `llama3`: wavelengths below `original_max_position / high_freq_factor`
            are kept.
        original_max_position: `llama3`: the context length before stretching, in tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig(metaclass=_Presets):
    """One decoder. Every family is a setting of these fields.

    Attributes:
        family: The family whose table says where the weights come from.
        num_layers: Number of layers.
        vocab_size: Rows of the embedding table, padding rows included.
        embed_dim: Width of the residual stream.
        hidden_dim: Width of the dense feed-forward layer.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Size of one head; even.
        norm_eps: Epsilon of every RMS norm.
        norm_offset: RMS norms multiply by `1 + w` (Gemma) instead of `w`.
        post_norms: Attention and feed-forward outputs are normed before they are added.
        qk_norm: Queries and keys are normed over the head dimension before rotary.
        qkv_bias: The query, key and value projections have biases.
        activation: Of the gate: `silu`, or `gelu_tanh`, the tanh approximation.
        embed_scale: Embeddings are multiplied by sqrt(embed_dim), rounded to the compute dtype.
        tied: The head is the embedding table.
        query_scale: Factor of the attention scores.
        attn_softcap: Scores become `cap * tanh(score / cap)` before masking.
        final_softcap: The same for the logits.
        window: A local layer's query sees keys at a distance below this.
        pattern: Kinds of the layers, `L` local and `G` global, repeated over the depth.
        rope_theta: Rotary base of global layers.
        rope_local_theta: Rotary base of local layers; None takes `rope_theta`.
        rope_scaling: Stretching of the global layers' frequencies.
        rope_local_scaling: Stretching of the local layers' frequencies.
        num_experts: Experts of each layer; 0 for a dense feed-forward.
        experts_per_token: Experts that each token goes to.
        expert_hidden_dim: Width of one expert.
        norm_topk: The chosen experts' weights are renormalised to sum to one.
        num_labels: Outputs of a sequence-classification head; 0 for a language model.
        max_position: The context length that the model was published for, in tokens.
    """

    family: str
    num_layers: int
    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    norm_offset: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: bool = False
    tied: bool = False
    query_scale: float = 0.0
    attn_softcap: float | None = None
    final_softcap: float | None = None
    window: int | None = None
    pattern: str = GLOBAL
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    rope_local_scaling: RopeScaling | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_hidden_dim: int = 0
    norm_topk: bool = True
    num_labels: int = 0
    max_position: int = 8192

    def __post_init__(self) -> None:
        if not self.query_scale:
            object.__setattr__(self, "query_scale", self.head_dim**-0.5)

    @property
    def layer_kinds(self) -> str:
        """The kind of every layer, `L` or `G`."""
        repeats = -(-self.num_layers // len(self.pattern))
        return (self.pattern * repeats)[: self.num_layers]

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        from moorage_models.parameters import parameter_shapes

        return sum(math.prod(shape) for shape in parameter_shapes(self).values())

    def differences(self, other: ModelConfig) -> list[str]:
        """The fields in which two configs compute different numbers, as `field: here, there`."""
        ours, theirs = _comparable(self), _comparable(other)
        return [f"{k}: {v!s:.200}, {theirs[k]!s:.200}" for k, v in ours.items() if v != theirs[k]]


def _comparable(config: ModelConfig) -> dict[str, object]:
    fields = dataclasses.asdict(config)
    fields["pattern"] = config.layer_kinds
    fields["rope_local_theta"] = config.rope_local_theta or config.rope_theta
    unused = ["hidden_dim"] if config.num_experts else ["experts_per_token", "norm_topk"]
    return {k: v for k, v in fields.items() if k not in ("max_position", *unused)}
