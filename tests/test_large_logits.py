"""Log-probabilities and entropies of logits as large as those of real models, in float64 terms."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints import mesh_of
from moorage_server.engine.outputs import OUTPUTS, Logits

TOKENS, VOCABULARY = 64, 50_000


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Some tokens of which one stands out, as SmolLM2's do; others of which none does."""
    rng = np.random.default_rng(1)
    values = rng.normal(0, 3, (1, TOKENS, VOCABULARY)) + 8
    values[0, ::2, 7] += rng.uniform(5, 30, TOKENS // 2)
    return values.astype(np.float32)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0, 2.0])
def test_they_are_as_exact_as_the_logits(logits: np.ndarray, temperature: float) -> None:
    values = logits / np.float32(temperature)
    ids = np.argsort(values, axis=-1)[..., -5:].astype(np.int32)
    layout = NamedSharding(mesh_of(1, 1), PartitionSpec())
    asked = Logits.of(jnp.asarray(values), jnp.asarray(ids[..., -1]), jnp.asarray(ids), 5, layout)

    exact = values.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    wanted = np.take_along_axis(exact, ids, -1)
    entropy = -(np.exp(exact) * exact).sum(-1)

    def found(name: str) -> list[np.ndarray]:
        compute = OUTPUTS[name].compute
        assert compute
        return [np.asarray(tensor) for tensor in compute(asked)]

    np.testing.assert_allclose(found("logprobs")[0], wanted[..., -1], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(found("candidates")[0], wanted, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(found("top_k")[1], wanted[..., ::-1], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(found("entropy")[0], entropy, rtol=2e-6, atol=2e-6)
    assert found("entropy")[0].min() >= 0
    assert found("logprobs")[0].max() <= 0
