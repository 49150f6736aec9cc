"""Every product goes through `contract`, and nothing of size [T, T] or [T, V] is held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from checkpoints import GOLDEN, mesh_of, open_folder
from moorage_models import attention, decoder, moe, ops
from moorage_models.attention import Visibility
from moorage_models.config import ModelConfig
from moorage_models.decoder import logits_of, trunk
from moorage_models.parameters import parameter_shapes
from moorage_server.engine.head import CHUNK, head
from moorage_server.engine.outputs import Profile, served

LENGTH = 1280  # five blocks: no group of heads has five, whose rows would look like a square
FAMILIES = [
    "gemma1_mqa",
    "gemma2",
    "gemma3_mm_4b",
    "llama3",
    "qwen2p5_tied",
    "qwen3_untied",
    "qwen3_moe",
    "gemma2_reward",
]
PRODUCTS = {"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"}
HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def config_of(name: str) -> ModelConfig:
    return open_folder(GOLDEN / name).config


def jaxpr_of(
    config: ModelConfig, dtype: str = "bfloat16", length: int = LENGTH
) -> tuple[Jaxpr, Jaxpr]:
    """The programs of trunk and head on a mesh that splits everything it can."""
    settings = {"config": config, "mesh": mesh_of(2, 2)}
    params = {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in parameter_shapes(config).items()
    }
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    hidden = jax.ShapeDtypeStruct((2, length, config.embed_dim), jnp.float32)

    def run_trunk(params: Any, tokens: Any, positions: Any, segments: Any, depth: Any) -> Any:
        visible = Visibility(segments=segments)
        how = {"compute_dtype": dtype, "depth": depth}
        return trunk(params, tokens, positions, visible, **settings, **how)

    def run_head(params: Any, hidden: Any) -> Any:
        return logits_of(params, hidden, **settings)

    depth = jax.ShapeDtypeStruct((), jnp.int32)
    body = jax.make_jaxpr(run_trunk)(params, ids, ids, ids, depth)
    return body.jaxpr, jax.make_jaxpr(run_head)(params, hidden).jaxpr


def jaxpr_of_head(config: ModelConfig, profile: Profile) -> Jaxpr:
    """A program of the head, as it is served: one chunk on each of two devices."""
    shape = (2, CHUNK)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    run = partial(head, profile=profile, config=config, mesh=mesh_of(2, 2))
    return jax.make_jaxpr(run)(
        {
            name: jax.ShapeDtypeStruct(shape, "bfloat16")
            for name, shape in parameter_shapes(config).items()
        },
        jax.ShapeDtypeStruct((*shape, config.embed_dim), jnp.float32),
        ids,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct((*shape, profile.candidates), jnp.int32),
    ).jaxpr


def equations(jaxpr: Jaxpr, scope: str = "") -> Iterator[tuple[JaxprEqn, str]]:
    """Every equation, inside loops and calls too, with the path of the named scopes around it."""
    for equation in jaxpr.eqns:
        path = f"{scope}/{equation.source_info.name_stack}"
        yield equation, path
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from equations(getattr(value, "jaxpr", value), path)


def products(*jaxprs: Jaxpr) -> list[tuple[JaxprEqn, str]]:
    found = [pair for jaxpr in jaxprs for pair in equations(jaxpr)]
    return [(eqn, path) for eqn, path in found if eqn.primitive.name in PRODUCTS]


def precision_of(equation: JaxprEqn) -> Any:
    """What a product states: the highest, but for groups of bfloat16, for which TPUs have no other
    than their own, and which they multiply exactly."""
    operands = {v.aval.dtype for v in equation.invars[:2]}
    grouped = equation.primitive.name.startswith("ragged_dot")
    return None if grouped and operands == {jnp.dtype(jnp.bfloat16)} else HIGHEST


def bypasses(*jaxprs: Jaxpr) -> list[str]:
    """The products that are not `contract`'s, or not as exact as it promises."""
    return [
        f"{path}: {equation}"
        for equation, path in products(*jaxprs)
        if "contract" not in path.split("/")
        or equation.params["precision"] != precision_of(equation)
        or equation.params["preferred_element_type"] != jnp.float32
    ]


def shapes(jaxpr: Jaxpr) -> set[tuple[int, ...]]:
    return {v.aval.shape for equation, _ in equations(jaxpr) for v in equation.outvars}


def held_squares(jaxpr: Jaxpr) -> set[tuple[int, ...]]:
    return {shape for shape in shapes(jaxpr) if shape.count(LENGTH) > 1}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_product_goes_through_contract(name: str, dtype: str) -> None:
    config = config_of(name)
    jaxprs = jaxpr_of(config, dtype)
    assert bypasses(*jaxprs) == []
    # q, k, v, o, scores, values of the first and of further runs of keys, and the head, then three
    # of a dense layer or four of experts
    assert len(products(*jaxprs)) == (12 if config.num_experts else 11)


@pytest.mark.parametrize("name", ["gemma2", "llama3", "gemma2_reward"])
def test_every_program_of_the_head_goes_through_contract(name: str) -> None:
    config = config_of(name)
    for profile in served(config):
        jaxpr = jaxpr_of_head(config, profile)
        assert bypasses(jaxpr) == [], profile
        assert len(products(jaxpr)) == (profile.outputs != ("hidden",)), profile


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_grouped_experts_go_through_contract(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerators run in place of one expert after another."""
    monkeypatch.setattr(moe, "one_by_one", moe.grouped)
    body, _ = jaxpr_of(config_of("qwen3_moe"), dtype)
    kinds = [equation.primitive.name for equation, _ in products(body)]
    assert sum(kind.startswith("ragged_dot") for kind in kinds) == 3
    assert bypasses(body) == []


def plain_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w.T


def inexact_einsum(x: jax.Array, w: jax.Array) -> jax.Array:
    with jax.named_scope("contract"):
        return jnp.einsum("bti,oi->bto", x, w, preferred_element_type=jnp.float32)


def narrow_einsum(x: jax.Array, w: jax.Array) -> jax.Array:
    with jax.named_scope("contract"):
        return jnp.einsum("bti,oi->bto", x, w, precision=jax.lax.Precision.HIGHEST)


def unscoped_einsum(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(
        "bti,oi->bto",
        x,
        w,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@pytest.mark.parametrize("product", [plain_matmul, inexact_einsum, narrow_einsum, unscoped_einsum])
def test_a_planted_bypass_is_caught(
    product: Callable[[jax.Array, jax.Array], jax.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(x: jax.Array, weights: dict[str, jax.Array], linear: ops.Linear) -> jax.Array:
        hidden = product(x, weights["mlp.gate"]).astype(x.dtype)
        return linear.project(hidden, "layers.mlp.down", weights["mlp.down"])

    monkeypatch.setattr(decoder, "_mlp", planted)
    assert len(bypasses(*jaxpr_of(config_of("llama3")))) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_trunk_holds_neither_squares_nor_logits(name: str) -> None:
    config = config_of(name)
    body, head = jaxpr_of(config)
    assert held_squares(body) == set()
    logits = {shape for shape in shapes(body) if {LENGTH, config.vocab_size} <= set(shape)}
    assert logits == set()
    # nor either of them under another shape: scores of one block of queries are the most
    widest = 2 * config.num_heads * attention.QUERY_BLOCK * LENGTH
    assert max(math.prod(shape) for shape in shapes(body)) <= widest
    # the same question finds what the head makes of all tokens at once
    assert (2, LENGTH, config.num_labels or config.vocab_size) in shapes(head)


def test_a_block_as_long_as_the_row_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_block", lambda length: length)
    body, _ = jaxpr_of(config_of("llama3"))
    assert held_squares(body)


def test_a_row_that_is_no_multiple_of_the_block_is_padded() -> None:
    body, _ = jaxpr_of(config_of("llama3"), length=LENGTH - 24)
    assert held_squares(body) == set()
    assert all(shape.count(LENGTH - 24) < 2 for shape in shapes(body))
