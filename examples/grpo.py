"""GRPO whose frozen reference model is in a server: the trainer holds the policy alone.

    moorage serve --root tests/golden --mesh fsdp=1,tp=1 --buckets 8x128 --outputs logprobs
    python examples/grpo.py "$PWD/tests/golden/qwen3_f32" --compare

For each prompt a step samples a group of completions and sends them to the reference, which scores
them while the policy goes on with the next prompt. A server that is killed and comes back with
--restore is a pause in `Future.result`; nothing here knows of it.

--compare trains once more with the reference in this process. Every loss must be the same, to the
bit: the exit code is 1 if one is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import moorage
from local_models import LocalReference, Rows, load, optimizer_of, padded, token_logprobs
from moorage_models import Decoder
from reward import advantages

PROMPTS: Rows = ((2, 17, 90, 4), (2, 201, 33), (2, 8, 8, 150, 61, 7))
GROUP = 4  # completions of each prompt
NEW_TOKENS = 12
WIDTH = max(map(len, PROMPTS)) + NEW_TOKENS
BETA = 0.04  # weight of the divergence from the reference
SGD = optax.sgd(0.05)  # made once, as what is compiled is compiled for it
EOS = 1

Reward = Callable[[Sequence[int], Rows], np.ndarray]
"""From a prompt and its completions to one reward a completion."""


class Reference(Protocol):
    """A frozen model: `moorage.Model`, or `LocalReference`."""

    def forward_async(self, rows: Rows, *, from_position: int) -> Future[Any]:
        """Begins to score rows of token ids from a position on."""
        ...


class Batch(NamedTuple):
    """What one update needs.

    Attributes:
        tokens: Prompts and completions, `[rows, width]`.
        segments: 1, and 0 at padding, `[rows, width]`.
        completion: 1 where the next token is of the completion, `[rows, width - 1]`.
        reference: The reference's log-probabilities of those, 0 elsewhere, `[rows, width - 1]`.
        advantages: `[rows]`.
    """

    tokens: np.ndarray
    segments: np.ndarray
    completion: np.ndarray
    reference: np.ndarray
    advantages: np.ndarray


def variety(prompt: Sequence[int], completions: Rows) -> np.ndarray:
    """A reward for the example: the share of a completion's tokens that are not repeated."""
    return np.array([len(set(ids)) / len(ids) for ids in completions])


@nnx.jit
def _logits_after(policy: Decoder, tokens: jax.Array, at: jax.Array) -> jax.Array:
    return policy(tokens)[0][:, at]


def sample(policy: Decoder, prompt: Sequence[int], key: jax.Array) -> list[list[int]]:
    """Samples a group of completions, a whole forward pass a token: models here are tiny.

    Returns:
        The prompt with each completion, which ends with EOS or after NEW_TOKENS.
    """
    tokens = np.zeros((GROUP, WIDTH), np.int32)
    start, stop = len(prompt), len(prompt) + NEW_TOKENS
    tokens[:, :start] = prompt
    for at in range(start, stop):
        logits = _logits_after(policy, tokens, at - 1)
        tokens[:, at] = jax.random.categorical(jax.random.fold_in(key, at), logits)
    ends = [next((at + 1 for at in range(start, stop) if row[at] == EOS), stop) for row in tokens]
    return [row[:end].tolist() for row, end in zip(tokens, ends, strict=True)]


def rollout(policy: Decoder, reference: Reference, reward: Reward, key: jax.Array) -> Batch:
    """Samples, has the reference score, and judges.

    Args:
        policy: The policy.
        reference: Asked for each group as soon as it is sampled; waited for at the end.
        reward: Judges a group.
        key: Of the samples.

    Returns:
        The batch of all prompts.
    """
    rows, starts, asked, judged = [], [], [], []
    for prompt, own_key in zip(PROMPTS, jax.random.split(key, len(PROMPTS)), strict=True):
        group = sample(policy, prompt, own_key)
        asked.append(reference.forward_async(group, from_position=len(prompt)))
        judged.append(advantages(reward(prompt, [row[len(prompt) :] for row in group])))
        rows += group
        starts += [len(prompt)] * GROUP
    logprobs = [row for answer in asked for row in answer.result().logprobs]
    completion, scored = np.zeros((2, len(rows), WIDTH - 1), np.float32)
    for i, (start, values) in enumerate(zip(starts, logprobs, strict=True)):
        wanted = slice(start - 1, start - 1 + len(values))
        completion[i, wanted], scored[i, wanted] = 1, values
    return Batch(*padded(rows, WIDTH), completion, scored, np.concatenate(judged, dtype=np.float32))


def grpo_loss(policy: Decoder, batch: Batch) -> jax.Array:
    """The loss of one update on the policy's own samples, where the ratio is 1 and nothing clips.

    Args:
        policy: The policy, to be differentiated.
        batch: The batch.

    Returns:
        The mean over rows of the mean over a completion's tokens, float32 `[]`.
    """
    logprobs = token_logprobs(policy, batch.tokens, batch.segments)
    ratio = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
    drift = batch.reference - logprobs
    divergence = jnp.exp(drift) - drift - 1
    losses = BETA * divergence - ratio * batch.advantages[:, None]
    means = (losses * batch.completion).sum(axis=1) / batch.completion.sum(axis=1)
    return means.mean()


@nnx.jit
def _update(policy: Decoder, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
    loss, gradients = nnx.value_and_grad(grpo_loss)(policy, batch)
    optimizer.update(policy, gradients)
    return loss


def train(
    policy: Decoder, reference: Reference, steps: int, reward: Reward = variety
) -> list[float]:
    """Trains the policy in place.

    Args:
        policy: The policy.
        reference: The frozen reference.
        steps: How many updates.
        reward: Judges completions.

    Returns:
        The loss of each step.
    """
    optimizer = optimizer_of(policy, SGD)
    keys = jax.random.split(jax.random.key(0), steps)
    batches = (rollout(policy, reference, reward, key) for key in keys)
    return [float(_update(policy, optimizer, batch)) for batch in batches]


def main(argv: list[str]) -> int:
    """Trains against a running server; says whether the comparison held."""
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("folder", type=Path, help="the checkpoint, below the server's --root too")
    parser.add_argument("--server", help="host:port; MOORAGE_SERVER by default")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compare", action="store_true", help="with a reference in this process")
    options = parser.parse_args(argv)
    folder: Path = options.folder.resolve()
    with moorage.connect(options.server) as client:
        reference = client.load(
            folder.name, "internal", str(folder), dtype="float32", lease=60, client_name="grpo"
        )
        remote = train(load(folder), reference, options.steps)
        buckets = client.info().buckets
    print("loss, reference remote:", *remote)
    if not options.compare:
        return 0
    local = train(load(folder), LocalReference(folder, buckets), options.steps)
    print("loss, reference local: ", *local)
    return int(remote != local)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
