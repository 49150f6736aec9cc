"""Tunix's own GRPO learner, whose reference model is in a server.

    moorage serve --root tests/golden --mesh fsdp=1,tp=1 --buckets 8x128 --outputs logprobs
    python examples/grpo_tunix.py "$PWD/tests/golden/qwen3_f32" --compare

Runs in Tunix's environment: google-tunix and `pip install moorage`, the client alone. (The server's
environment holds versions that google-tunix refuses.) The change to a trainer is one class,
`RemoteReferenceCluster` in place of Tunix's `RLCluster`: everything else below is Tunix as usual.

--compare trains once more with the reference as Tunix holds it, in the trainer's memory, and prints
both losses of each step.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3.params import create_model_from_safe_tensors
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

import moorage

PROMPTS = ("17 90 4", "201 33", "8 8 150 61 7", "5")
NEW_TOKENS = 12


class RemoteReferenceCluster(RLCluster):
    """An `RLCluster` that asks a server for the reference's log-probabilities.

    Args:
        reference: The frozen model.
        **settings: As Tunix's class takes them; REFERENCE has a mesh there, on which nothing is.
    """

    def __init__(self, *, reference: moorage.Model, **settings: Any) -> None:
        super().__init__(reference=None, **settings)
        self._remote = reference

    def get_ref_per_token_logps(
        self,
        prompt_tokens: jax.Array,
        completion_tokens: jax.Array,
        pad_id: int,
        eos_id: int,
        micro_batch_size: int | None = None,
        completion_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Log-probabilities of the completions' tokens under the reference.

        Args:
            prompt_tokens: Padded on the left, `[rows, prompt]`.
            completion_tokens: Padded on the right, `[rows, length]`.
            pad_id: What pads prompts.
            eos_id: What ends a completion.
            micro_batch_size: Not needed: the server cuts batches itself.
            completion_mask: Which tokens are of a completion; those up to the first `eos_id` if
                left out.

        Returns:
            float32 `[rows, length]`; 0 after a completion's end, which the loss leaves out.
        """
        completions = np.asarray(completion_tokens)
        prompts = [row[row != pad_id] for row in np.asarray(prompt_tokens)]
        if completion_mask is None:
            is_end = completions == eos_id
            lengths = np.where(is_end.any(1), is_end.argmax(1) + 1, completions.shape[1])
        else:
            lengths = np.asarray(completion_mask).sum(1)
        pairs = zip(prompts, completions, lengths, strict=True)
        rows = [np.concatenate([prompt, ids[:length]]) for prompt, ids, length in pairs]
        found = self._remote.forward(rows, from_position=[*map(len, prompts)]).logprobs or []
        table = np.zeros(completions.shape, np.float32)
        for line, values in zip(table, found, strict=True):
            line[: len(values)] = values
        return jnp.asarray(table)


class IdTokenizer:
    """Stands in for a tokenizer: a text is token ids with blanks between."""

    def encode(self, text: str, **_: Any) -> list[int]:
        """Reads ids."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Writes ids."""
        return " ".join(str(i) for i in ids)

    def pad_id(self) -> int:
        """What pads."""
        return 0

    def eos_id(self) -> int:
        """What ends a sequence."""
        return 1

    def bos_id(self) -> int:
        """What begins a sequence."""
        return 2


def variety(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """A reward for the example: the share of a completion's tokens that are not repeated."""
    return [len({*text.split()}) / max(len(text.split()), 1) for text in completions]


def load(folder: Path, mesh: jax.sharding.Mesh) -> qwen3.Qwen3:
    """Loads a Qwen3 checkpoint as Tunix does, in float32."""
    stored = json.loads((folder / "config.json").read_text())
    config = qwen3.ModelConfig(
        num_layers=stored["num_hidden_layers"],
        vocab_size=stored["vocab_size"],
        embed_dim=stored["hidden_size"],
        hidden_dim=stored["intermediate_size"],
        num_heads=stored["num_attention_heads"],
        head_dim=stored["head_dim"],
        num_kv_heads=stored["num_key_value_heads"],
        rope_theta=stored["rope_theta"],
        norm_eps=stored["rms_norm_eps"],
        use_tied_embedding=stored["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(str(folder), config, mesh, dtype=jnp.float32)


def train(folder: Path, reference: moorage.Model | None, steps: int) -> list[float]:
    """Runs Tunix's learner.

    Args:
        folder: The policy's checkpoint.
        reference: The reference in a server; None for one of `folder` in this process.
        steps: How many updates.

    Returns:
        The loss of each step, as Tunix's metrics have it.
    """
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto)
    training = RLTrainingConfig(
        actor_optimizer=optax.sgd(0.05), eval_every_n_steps=steps + 1, max_steps=steps
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=NEW_TOKENS, max_prompt_length=8, kv_cache_size=32, temperature=1.0
    )
    config = ClusterConfig(
        role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
        training_config=training,
        rollout_config=rollout,
    )
    make_cluster = RemoteReferenceCluster if reference else RLCluster
    cluster = make_cluster(
        actor=load(folder, mesh),
        reference=reference or load(folder, mesh),
        tokenizer=IdTokenizer(),
        cluster_config=config,
    )
    learner = GRPOLearner(cluster, GRPOConfig(num_generations=4, beta=0.04), variety)
    learner.train([{"prompts": np.array(PROMPTS)} for _ in range(steps)])
    history = cluster.actor_trainer.metrics_logger.get_metric_history("actor", "loss", "train")
    return history.tolist()


def main(argv: list[str]) -> None:
    """Trains against a running server."""
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("folder", type=Path, help="a Qwen3 checkpoint, below the server's --root")
    parser.add_argument("--server", help="host:port; MOORAGE_SERVER by default")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compare", action="store_true", help="with a reference in this process")
    options = parser.parse_args(argv)
    folder: Path = options.folder.resolve()
    with moorage.connect(options.server) as client:
        reference = client.load(
            folder.name, "internal", str(folder), dtype="float32", lease=60, client_name="tunix"
        )
        print("loss, reference remote:", *train(folder, reference, options.steps))
    if options.compare:
        print("loss, reference local: ", *train(folder, None, options.steps))


if __name__ == "__main__":
    logging.disable()
    main(sys.argv[1:])
