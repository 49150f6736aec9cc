"""The decoder's parameters: their names, their axes and when they exist.

A parameter has the shape in which a Hugging Face checkpoint stores it, `[out, in]`; those under
`layers.` are stacked over the layers on a new first axis. The letters of the axes are:

    v vocabulary    d embed_dim      n num_heads * head_dim    k num_kv_heads * head_dim
    h head_dim      f hidden_dim     e experts                 m expert_hidden_dim    c labels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moorage_models.config import ModelConfig

LAYERS = "layers."


def _always(_: ModelConfig) -> bool:
    return True


@dataclass(frozen=True)
class Parameter:
    """One parameter of the decoder.

    Attributes:
        axes: Its axes' letters, without the stacking axis.
        exists: Whether a config has it.
    """

    axes: str
    exists: Callable[[ModelConfig], bool] = _always


def _dense(config: ModelConfig) -> bool:
    return config.num_experts == 0


def _moe(config: ModelConfig) -> bool:
    return config.num_experts > 0


PARAMETERS: dict[str, Parameter] = {
    "embed": Parameter("v d"),
    "final_norm": Parameter("d"),
    "head": Parameter("v d", lambda c: not c.tied and not c.num_labels),
    "score": Parameter("c d", lambda c: c.num_labels > 0),
    "layers.attn_norm": Parameter("d"),
    "layers.attn.q": Parameter("n d"),
    "layers.attn.k": Parameter("k d"),
    "layers.attn.v": Parameter("k d"),
    "layers.attn.o": Parameter("d n"),
    "layers.attn.q_bias": Parameter("n", lambda c: c.qkv_bias),
    "layers.attn.k_bias": Parameter("k", lambda c: c.qkv_bias),
    "layers.attn.v_bias": Parameter("k", lambda c: c.qkv_bias),
    "layers.attn.q_norm": Parameter("h", lambda c: c.qk_norm),
    "layers.attn.k_norm": Parameter("h", lambda c: c.qk_norm),
    "layers.attn_post_norm": Parameter("d", lambda c: c.post_norms),
    "layers.mlp_norm": Parameter("d"),
    "layers.mlp.gate": Parameter("f d", _dense),
    "layers.mlp.up": Parameter("f d", _dense),
    "layers.mlp.down": Parameter("d f", _dense),
    "layers.moe.router": Parameter("e d", _moe),
    "layers.moe.gate": Parameter("e m d", _moe),
    "layers.moe.up": Parameter("e m d", _moe),
    "layers.moe.down": Parameter("e d m", _moe),
    "layers.mlp_post_norm": Parameter("d", lambda c: c.post_norms),
}


def head_parameter(config: ModelConfig) -> str:
    """The parameter that hidden states are multiplied by in the end."""
    return "score" if config.num_labels else "embed" if config.tied else "head"


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each axis letter."""
    return {
        "v": config.vocab_size,
        "d": config.embed_dim,
        "n": config.num_heads * config.head_dim,
        "k": config.num_kv_heads * config.head_dim,
        "h": config.head_dim,
        "f": config.hidden_dim,
        "e": config.num_experts,
        "m": config.expert_hidden_dim,
        "c": config.num_labels,
    }


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that `config` has, stacked ones with the layer axis first."""
    sizes = axis_sizes(config)
    shapes = {}
    for name, parameter in PARAMETERS.items():
        if parameter.exists(config):
            shape = tuple(sizes[letter] for letter in parameter.axes.split())
            shapes[name] = (config.num_layers, *shape) if name.startswith(LAYERS) else shape
    return shapes
