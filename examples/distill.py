"""Distillation from a teacher in a server, by the tokens that it holds most probable.

    moorage serve --root tests/golden --outputs top_k
    python examples/distill.py "$PWD/tests/golden/qwen3_f32" llama3

STUDENT is a folder here; TEACHER is a path below the server's --root. Both have one vocabulary.

At each position the teacher gives its k best tokens with their log-probabilities, k numbers for a
vocabulary. The loss is the divergence KL(teacher || student) between k + 1 outcomes: each of these
tokens, and *any other*. So the mass of the tail is matched as a whole, and how it is shared out
there is left to the student. It is never more than the divergence of the whole vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import moorage
from local_models import Rows, load, next_logprobs, optimizer_of, padded
from moorage_models import Decoder

ADAM = optax.adam(3e-3)
_LEAST = 1e-9  # of the teacher's tail: 1 - sum(p) is rounded


class Batch(NamedTuple):
    """Rows of one length, and what the teacher says of each token but the first.

    Attributes:
        tokens: `[rows, length]`.
        ids: The teacher's best tokens, `[rows, length - 1, k]`.
        logprobs: Their log-probabilities, `[rows, length - 1, k]`.
    """

    tokens: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray


def ask(teacher: moorage.Model, rows: Rows, k: int) -> Future[moorage.Scores]:
    """Asks for the teacher's `k` best tokens at each position; at the first there are none."""
    return teacher.forward_async(rows, ["top_k"], top_k=k, from_position=1)


def top_k_divergence(student: jax.Array, ids: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(teacher || student) between the teacher's best tokens and any other.

    Args:
        student: Log-probabilities of the whole vocabulary, `[..., vocabulary]`.
        ids: The teacher's best tokens, fewer than the vocabulary, `[..., k]`.
        teacher: Their log-probabilities, `[..., k]`.

    Returns:
        In nats, `[...]`.
    """
    chosen = jnp.take_along_axis(student, ids, axis=-1)
    others = jnp.put_along_axis(student, ids, -jnp.inf, axis=-1, inplace=False)
    best, tail = jnp.exp(teacher), jnp.maximum(1 - jnp.exp(teacher).sum(axis=-1), _LEAST)
    of_best = (best * (teacher - chosen)).sum(axis=-1)
    return of_best + tail * (jnp.log(tail) - jax.nn.logsumexp(others, axis=-1))


def distillation_loss(student: Decoder, batch: Batch) -> jax.Array:
    """The mean divergence over all positions but the first of each row, float32 `[]`."""
    logprobs = next_logprobs(student, batch.tokens, jnp.ones_like(batch.tokens))
    return top_k_divergence(logprobs, batch.ids, batch.logprobs).mean()


@nnx.jit
def _update(student: Decoder, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
    loss, gradients = nnx.value_and_grad(distillation_loss)(student, batch)
    optimizer.update(student, gradients)
    return loss


def batch_of(rows: Rows, answer: moorage.Scores) -> Batch:
    """Stacks what the teacher said of rows of one length."""
    tokens, _ = padded(rows, len(rows[0]))
    assert answer.top_k_ids is not None
    assert answer.top_k_logprobs is not None
    return Batch(tokens, np.stack(answer.top_k_ids), np.stack(answer.top_k_logprobs))


def train(
    student: Decoder, teacher: moorage.Model, batches: Sequence[Rows], k: int, steps: int
) -> list[float]:
    """Trains the student in place, going round the batches.

    The teacher works on the next batch while the student learns from this one.

    Args:
        student: The student.
        teacher: The teacher.
        batches: Rows of token ids, of one length within a batch.
        k: How many tokens the teacher gives.
        steps: How many updates.

    Returns:
        The loss of each step.
    """
    optimizer = optimizer_of(student, ADAM)
    losses = []
    asked = ask(teacher, batches[0], k)
    for step in range(steps):
        batch = batch_of(batches[step % len(batches)], asked.result())
        asked = ask(teacher, batches[(step + 1) % len(batches)], k)
        losses.append(float(_update(student, optimizer, batch)))
    return losses


def main(argv: list[str]) -> None:
    """Distils on rows of random tokens."""
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("student", type=Path, help="the student's folder")
    parser.add_argument("teacher", help="the teacher, below the server's --root")
    parser.add_argument("--server", help="host:port; MOORAGE_SERVER by default")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args(argv)
    student = load(options.student.resolve())
    with moorage.connect(options.server) as client:
        name = Path(options.teacher).name
        teacher = client.load(
            name, "internal", options.teacher, dtype="float32", lease=60, client_name="distill"
        )
        dice = np.random.default_rng(0)
        batches = dice.integers(student.config.vocab_size, size=(2, 4, 24))
        losses = train(student, teacher, batches, options.top_k, options.steps)
        print("divergence from the teacher, in nats a token:", *losses)


if __name__ == "__main__":
    main(sys.argv[1:])
