"""The decoder: every family is this one under a different config.

`trunk` turns tokens into hidden states, `logits_of` hidden states into logits. Both are pure
functions of the parameters. `Decoder` wraps them as an `nnx.Module` for use in a training script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from moorage_models.attention import QUERY_BLOCK, Visibility, attention
from moorage_models.config import LOCAL, ModelConfig
from moorage_models.moe import experts
from moorage_models.ops import (
    Linear,
    rms_norm,
    rotary_frequencies,
    rotary_turns,
    rotate,
    softcap,
)
from moorage_models.parameters import LAYERS, PARAMETERS, head_parameter

Params = Mapping[str, Array]
#: Cosines and sines of a layer's rotary angles.
Turns = tuple[Float32[Array, "b t half"], Float32[Array, "b t half"]]

_NO_WINDOW = np.int32(2**30)
_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def trunk(
    params: Params,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    visible: Visibility,
    *,
    config: ModelConfig,
    mesh: Mesh,
    compute_dtype: DTypeLike,
    depth: Int[Array, ""] | None = None,
) -> Float32[Array, "b t d"]:
    """Hidden states after the final norm, or after some layers.

    Args:
        params: The parameters, by name.
        tokens: Token ids.
        positions: Rotary positions; they restart in each segment.
        visible: Who sees whom.
        config: The configuration.
        mesh: The device mesh, axes Auto.
        compute_dtype: Dtype of activations and products; norms, softmax and rotary are float32.
        depth: After how many layers, 0 for the embeddings: without the final norm if there are
            more. None for all. It is a value, so that one program serves every depth.

    Returns:
        The hidden states in float32.
    """
    length = tokens.shape[1]
    if length > QUERY_BLOCK and length % QUERY_BLOCK:
        tokens, positions, visible = _pad(tokens, positions, visible, -length % QUERY_BLOCK)
    linear = Linear(config, mesh)
    table = linear.gather("embed", params["embed"], params["embed"].dtype)
    x = linear.activation(jnp.take(table, tokens, axis=0, mode="clip").astype(compute_dtype))
    if config.embed_scale:
        x = x * jnp.asarray(config.embed_dim**0.5, x.dtype)

    kinds, frequencies = _kinds(config)
    turns = rotary_turns(positions, frequencies)  # in the loop they would be found for each head

    def body(x: Array, layer: tuple[Params, Params]) -> tuple[Array, None]:
        weights, kind = layer
        own = (jax.lax.dynamic_index_in_dim(turn, kind["rotary"], keepdims=False) for turn in turns)
        y = _layer(x, weights, kind["window"], tuple(own), visible, linear)
        return (y if depth is None else jnp.where(kind["index"] < depth, y, x)), None

    stacked = {k.removeprefix(LAYERS): v for k, v in params.items() if k.startswith(LAYERS)}
    if depth is None:  # then it may be differentiated
        body = jax.checkpoint(body, prevent_cse=False)
    x, _ = jax.lax.scan(body, x, (stacked, kinds))
    normed = rms_norm(x, params["final_norm"], config.norm_eps, offset=config.norm_offset)
    if depth is not None:
        normed = jnp.where(depth < config.num_layers, x.astype(jnp.float32), normed)
    return normed[:, :length]


def logits_of(
    params: Params, hidden: Float32[Array, "b t d"], *, config: ModelConfig, mesh: Mesh
) -> Float32[Array, "b t v"]:
    """Logits, or a reward model's scores `[b, t, labels]`, in float32 throughout."""
    name = head_parameter(config)
    logits = Linear(config, mesh).project(hidden, name, params[name])
    return logits if config.num_labels else softcap(logits, config.final_softcap)


def _layer(
    x: Float[Array, "b t d"],
    weights: Mapping[str, Array],
    window: Int[Array, ""],
    turns: Turns,
    visible: Visibility,
    linear: Linear,
) -> Float[Array, "b t d"]:
    config = linear.config
    norm = partial(_norm, weights=weights, config=config, dtype=x.dtype)
    attended = _attention(norm(x, name="attn_norm"), weights, window, turns, visible, linear)
    x = x + (norm(attended, name="attn_post_norm") if config.post_norms else attended)
    feed = experts if config.num_experts else _mlp
    fed = feed(norm(x, name="mlp_norm"), weights, linear)
    return linear.activation(x + (norm(fed, name="mlp_post_norm") if config.post_norms else fed))


def _attention(
    x: Float[Array, "b t d"],
    weights: Mapping[str, Array],
    window: Int[Array, ""],
    turns: Turns,
    visible: Visibility,
    linear: Linear,
) -> Float[Array, "b t d"]:
    config = linear.config

    def heads(name: str) -> Array:
        y = linear.project(x, f"layers.attn.{name}", weights[f"attn.{name}"])
        if config.qkv_bias:
            y = y + weights[f"attn.{name}_bias"].astype(y.dtype)
        y = y.reshape(*y.shape[:2], -1, config.head_dim)
        if config.qk_norm and name != "v":
            y = _norm(y, weights=weights, name=f"attn.{name}_norm", config=config, dtype=y.dtype)
        return y if name == "v" else rotate(y, *turns)

    out = attention(heads("q"), heads("k"), heads("v"), visible, window, linear)
    out = out.reshape(*x.shape[:2], -1)
    return linear.project(out, "layers.attn.o", weights["attn.o"])


def _mlp(
    x: Float[Array, "b t d"], weights: Mapping[str, Array], linear: Linear
) -> Float[Array, "b t d"]:
    gate = linear.project(x, "layers.mlp.gate", weights["mlp.gate"])
    up = linear.project(x, "layers.mlp.up", weights["mlp.up"])
    activated = _ACTIVATIONS[linear.config.activation](gate.astype(jnp.float32))
    hidden = (activated * up).astype(x.dtype)
    return linear.project(hidden, "layers.mlp.down", weights["mlp.down"])


def _norm(
    x: Array, *, weights: Mapping[str, Array], name: str, config: ModelConfig, dtype: DTypeLike
) -> Array:
    normed = rms_norm(x, weights[name], config.norm_eps, offset=config.norm_offset)
    return normed.astype(dtype)


def _kinds(config: ModelConfig) -> tuple[dict[str, Array], Float32[np.ndarray, "kinds half"]]:
    """What tells layers apart: number, window and set of rotary frequencies `[L]`; and the sets."""
    is_local = np.array([kind == LOCAL for kind in config.layer_kinds])
    glob = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    local_theta = config.rope_local_theta or config.rope_theta
    local = rotary_frequencies(config.head_dim, local_theta, config.rope_local_scaling)
    sets = [glob] if np.array_equal(local, glob) or not is_local.any() else [glob, local]
    return {
        "index": jnp.arange(config.num_layers),
        "window": jnp.asarray(np.where(is_local, config.window or _NO_WINDOW, _NO_WINDOW)),
        "rotary": jnp.asarray(np.where(is_local, len(sets) - 1, 0)),
    }, np.stack(sets)


def _pad(
    tokens: Array, positions: Array, visible: Visibility, padding: int
) -> tuple[Array, Array, Visibility]:
    """Lengthens rows on the right with tokens that no other sees."""
    rows = ((0, 0), (0, padding))
    segments = None if visible.segments is None else jnp.pad(visible.segments, rows)
    mask = None if visible.mask is None else jnp.pad(visible.mask, (*rows, (0, padding)))
    return jnp.pad(tokens, rows), jnp.pad(positions, rows), Visibility(segments, mask)


class Decoder(nnx.Module):
    """A loaded decoder whose `nnx.Param`s are the stacked weights.

    The call has the signature of Tunix's models, so log-probability and gradient code written for
    those takes this one. It has no key/value cache: `cache` must be None.

    Attributes:
        config: The configuration.
        mesh: The device mesh.
        compute_dtype: Dtype of activations and products.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, params: Params, compute_dtype: DTypeLike
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.compute_dtype = np.dtype(compute_dtype).name
        for name, value in _nested(params).items():
            setattr(self, name, value)

    @property
    def params(self) -> dict[str, Array]:
        """The parameters by name, as `trunk` takes them."""
        found = {}
        for name in PARAMETERS:
            if name.split(".")[0] in vars(self) and PARAMETERS[name].exists(self.config):
                node: Any = self
                for part in name.split("."):
                    node = getattr(node, part)
                found[name] = node[...]
        return found

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "b t"],
        positions: Int[Array | np.ndarray, "b t"] | None = None,
        cache: None = None,
        attention_mask: Bool[Array | np.ndarray, "b t t"] | None = None,
        *,
        segment_ids: Int[Array | np.ndarray, "b t"] | None = None,
    ) -> tuple[Float32[Array, "b t v"], None]:
        """Logits after every token.

        Args:
            tokens: Token ids.
            positions: Rotary positions; counted within each segment if left out.
            cache: Not supported; None.
            attention_mask: Query by key; True where the query may look. Sliding windows apply on
                top. If left out, tokens see those before them in their segment.
            segment_ids: Packs several sequences in a row; 0 is padding. One segment a row if left
                out. Not together with `attention_mask`.

        Returns:
            The logits in float32 (a reward model's scores, `[b, t, labels]`), and None.

        Raises:
            ValueError: A cache was given, or both a mask and segments.
        """
        if cache is not None:
            raise ValueError("this model scores whole sequences and keeps no cache: pass None")
        if attention_mask is not None and segment_ids is not None:
            raise ValueError("pass attention_mask or segment_ids, not both")
        tokens = jnp.asarray(tokens)
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        segments = None if segment_ids is None else jnp.asarray(segment_ids)
        if mask is None and segments is None:
            segments = jnp.ones_like(tokens)
        if positions is None:
            positions = segment_positions(tokens, segments)
        visible = Visibility(segments, mask)
        settings = (self.config, self.mesh, self.compute_dtype)
        return _forward(settings, self.params, tokens, jnp.asarray(positions), visible), None


@partial(jax.jit, static_argnums=0)
def _forward(
    settings: tuple[ModelConfig, Mesh, str],
    params: Params,
    tokens: Array,
    positions: Array,
    visible: Visibility,
) -> Array:
    config, mesh, dtype = settings
    hidden = trunk(
        params, tokens, positions, visible, config=config, mesh=mesh, compute_dtype=dtype
    )
    return logits_of(params, hidden, config=config, mesh=mesh)


def segment_positions(
    tokens: Int[Array, "b t"], segments: Int[Array, "b t"] | None
) -> Int[Array, "b t"]:
    """Positions that count from zero in every run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segments is None:
        return index
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _nested(params: Params) -> dict[str, Any]:
    """`{"layers.attn.q": x}` as nested `nnx.Dict`s of `nnx.Param`s."""
    tree: dict[str, Any] = {}
    for name, value in params.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = nnx.Param(value)
    return {name: _as_module(node) for name, node in tree.items()}


def _as_module(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return nnx.Dict({name: _as_module(child) for name, child in node.items()})
