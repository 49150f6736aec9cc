"""Models in process: loaded by id or folder, called and differentiated as Tunix's models are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from checkpoints import GOLDEN, mesh_of, stored_tensors
from moorage_models import (
    AutoModel,
    Decoder,
    ModelConfig,
    ModelError,
    ModelSource,
    Reason,
    create_model_from_safe_tensors,
)


@pytest.fixture
def mesh() -> Mesh:
    """What `jax.make_mesh` makes by default: axes Explicit."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), devices=jax.devices()[:4])
    assert set(mesh.axis_types) == {AxisType.Explicit}
    return mesh


def load(mesh: Mesh, folder: Path, model_id: str = "my-org/run-7", **more: Any) -> Decoder:
    model, path = AutoModel.from_pretrained(
        model_id, mesh, ModelSource.INTERNAL, str(folder), **more
    )
    assert path == str(more.get("model_download_path", folder))
    return model


def plain_case(name: str) -> dict[str, np.ndarray]:
    stored = np.load(GOLDEN / name / "golden.npz")
    keys = ("tokens", "positions", "logits", "logprobs", "noise")
    return {key: stored[f"plain/{key}"] for key in keys}


def logits_of(model: Decoder, case: dict[str, np.ndarray]) -> np.ndarray:
    logits, cache = model(jnp.asarray(case["tokens"]), jnp.asarray(case["positions"]))
    assert cache is None
    return np.asarray(logits)


def check_logits(model: Decoder, name: str = "llama3") -> None:
    case = plain_case(name)
    errors = np.abs(logits_of(model, case) - case["logits"])
    assert errors.max() <= 3 * case["noise"] + 2e-5


def test_an_id_that_follows_no_rule_loads_by_its_config(mesh: Mesh) -> None:
    model = load(mesh, GOLDEN / "llama3", dtype=jnp.float32)
    check_logits(model)
    assert (model.config.family, model.config.num_layers) == ("llama3", 2)
    assert set(model.mesh.axis_types) == {AxisType.Auto}


def test_a_folder_loads_as_with_tunix(mesh: Mesh) -> None:
    model = create_model_from_safe_tensors(str(GOLDEN / "llama3"), None, mesh, jnp.float32)
    check_logits(model)


def test_files_are_read_where_they_were_copied_to(mesh: Mesh, tmp_path: Path) -> None:
    model = load(mesh, GOLDEN / "llama3", dtype="float32", model_download_path=str(tmp_path))
    assert (tmp_path / "model.safetensors").exists()
    check_logits(model)


def test_parameters_are_the_checkpoints(mesh: Mesh) -> None:
    model = load(mesh, GOLDEN / "qwen2p5_tied")
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    stored = stored_tensors(GOLDEN / "qwen2p5_tied")
    assert sum(leaf.size for leaf in leaves) == sum(x.size for x in stored.values())
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
    assert model.compute_dtype == "bfloat16"
    embed = np.asarray(model.embed[...])
    assert (embed == stored["model.embed_tokens.weight"]).all()
    bias = np.asarray(model.layers.attn.q_bias[1])
    assert (bias == stored["model.layers.1.self_attn.q_proj.bias"]).all()


def test_a_reward_model_gives_one_score_a_token(mesh: Mesh) -> None:
    stored = np.load(GOLDEN / "qwen3_reward" / "golden.npz")
    model = load(mesh, GOLDEN / "qwen3_reward", dtype="float32")
    scores, _ = model(jnp.asarray(stored["plain/tokens"]))
    assert scores.shape == (2, 20, 1)
    errors = np.abs(np.asarray(scores) - stored["plain/scores"])
    assert errors.max() <= 3 * stored["plain/noise"] + 2e-5


@pytest.mark.parametrize("dtype", [jnp.float32, np.float32, "float32", np.dtype("float32")])
def test_a_dtype_is_given_in_any_spelling(dtype: Any) -> None:
    model = load(mesh_of(1, 1), GOLDEN / "llama3", dtype=dtype, compute_dtype=jnp.bfloat16)
    assert model.embed[...].dtype == jnp.float32
    assert model.compute_dtype == "bfloat16"


def test_the_arithmetic_follows_the_parameters() -> None:
    assert load(mesh_of(1, 1), GOLDEN / "llama3", dtype="float32").compute_dtype == "float32"


@pytest.mark.parametrize("dtype", ["int8", "float8", "float64", "bf16", jnp.int8])
@pytest.mark.parametrize("which", ["dtype", "compute_dtype"])
def test_a_dtype_that_models_cannot_have_is_refused(which: str, dtype: Any) -> None:
    with pytest.raises(ModelError, match="float32, float16, bfloat16") as caught:
        load(mesh_of(1, 1), GOLDEN / "llama3", **{which: dtype})
    assert caught.value.reason is Reason.INVALID_REQUEST


def mean_logprob(model: Decoder, tokens: jax.Array) -> jax.Array:
    """As a policy-gradient loss takes it from a Tunix model."""
    logits, _ = model(tokens)
    chosen = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return jnp.mean(jnp.take_along_axis(chosen, tokens[:, 1:, None], axis=-1))


by_nnx = nnx.jit(nnx.value_and_grad(mean_logprob))


@jax.jit
def by_jax(model: Decoder, tokens: jax.Array) -> Any:
    graph, params = nnx.split(model)
    return jax.value_and_grad(lambda p: mean_logprob(nnx.merge(graph, p), tokens))(params)


@pytest.mark.parametrize(
    ("name", "value_and_grad"),
    [
        ("gemma2", by_nnx),
        pytest.param("qwen3_moe", by_jax, marks=pytest.mark.soak),
    ],
)
def test_gradients_reach_every_parameter(
    name: str, value_and_grad: Callable[[Decoder, jax.Array], Any], mesh: Mesh
) -> None:
    """They are those of the function: along them it rises as fast as they say."""
    model = load(mesh, GOLDEN / name, dtype="float32")
    tokens, wanted = (jnp.asarray(plain_case(name)[key]) for key in ("tokens", "logprobs"))
    value, gradients = value_and_grad(model, tokens)
    assert float(value) == pytest.approx(np.nanmean(wanted), abs=1e-4)
    graph, params = nnx.split(model)
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)]
    assert len(leaves) == len(jax.tree.leaves(params))
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in leaves)

    slope = np.sqrt(sum(np.square(leaf).sum() for leaf in leaves))
    step = 1e-3 / slope  # small enough that no token changes its experts

    def moved(by: float) -> float:
        there = jax.tree.map(
            lambda x, g: jax.device_put(np.asarray(x) + by / slope * np.asarray(g), x.sharding),
            params,
            gradients,
        )
        return float(value_and_grad(nnx.merge(graph, there), tokens)[0])

    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(slope, rel=0.01)


def test_split_and_merge_give_the_same_model(mesh: Mesh) -> None:
    model = load(mesh, GOLDEN / "gemma3_text_mqa", dtype="float32")
    again = nnx.merge(*nnx.split(model))
    case = plain_case("gemma3_text_mqa")
    assert (again.config, again.compute_dtype) == (model.config, "float32")
    assert again.params.keys() == model.params.keys()
    assert (logits_of(again, case) == logits_of(model, case)).all()
    check_logits(again, "gemma3_text_mqa")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkpoint without a config.json."""
    shutil.copy(GOLDEN / "llama3" / "model.safetensors", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("model_id", "reason", "said"),
    [
        ("tiny", Reason.MODEL_ID_UNPARSEABLE, "tiny"),
        ("my-org/run-7", Reason.MODEL_FAMILY_UNKNOWN, "config.json"),
        ("gemma_9b", Reason.CONFIG_UNKNOWN, "gemma2_9b"),
        ("meta-llama/Meta-Llama-3-8B", Reason.CHECKPOINT_MISMATCH, r"wanted \[4096\]"),
    ],
)
def test_without_a_config_the_id_names_a_preset(
    model_id: str, reason: Reason, said: str, bare: Path, mesh: Mesh
) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        load(mesh, bare, model_id)
    assert caught.value.reason is reason


def test_a_config_that_is_given_stands_in_for_the_file(bare: Path, mesh: Mesh) -> None:
    config = ModelConfig(
        family="llama3",
        num_layers=2,
        vocab_size=320,
        embed_dim=64,
        hidden_dim=96,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        norm_eps=1e-5,
        rope_theta=500_000.0,
    )
    check_logits(load(mesh, bare, "tiny", config=config, dtype="float32"))
    check_logits(create_model_from_safe_tensors(str(bare), config, mesh, "float32"))


def test_a_folder_without_weights_is_not_found(tmp_path: Path, mesh: Mesh) -> None:
    shutil.copy(GOLDEN / "llama3" / "config.json", tmp_path)
    with pytest.raises(ModelError, match="no safetensors file") as caught:
        create_model_from_safe_tensors(str(tmp_path), None, mesh)
    assert caught.value.reason is Reason.CHECKPOINT_NOT_FOUND
