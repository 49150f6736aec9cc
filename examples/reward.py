"""Rewards, the best of n and group-relative advantages from a reward model in a server.

    moorage serve --root tests/golden --outputs score
    echo '{"prompt": [2, 5, 9], "completions": [[4, 7], [11], [8, 3]]}' |
        python examples/reward.py qwen3_reward

Reads one JSON object a line, a prompt and its completions as token ids; writes one a line. The
model is named by its path below the server's --root. Needs the client alone: no jax.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import moorage

Ids = Sequence[int]


def rewards(model: moorage.Model, prompt: Ids, completions: Sequence[Ids]) -> np.ndarray:
    """Scores completions of one prompt, all in one call.

    Args:
        model: A reward model with one label.
        prompt: Token ids.
        completions: Token ids of each; the reward is read after the last one.

    Returns:
        One reward a completion, float32 `[completions]`.

    Raises:
        moorage.Error: The model gives no scores, or the call failed.
    """
    answer = model.forward([[*prompt, *completion] for completion in completions], ["score"])
    assert answer.score is not None  # it was asked for
    return np.array([labels[0, 0] for labels in answer.score])  # one segment a row, one label


def advantages(values: np.ndarray) -> np.ndarray:
    """How much better than its group each completion is, in standard deviations.

    Args:
        values: The rewards of one prompt's completions, at least two.

    Returns:
        As many advantages; their mean is 0.
    """
    return (values - values.mean()) / (values.std(ddof=1) + 1e-4)


def judged(model: moorage.Model, group: dict[str, Any]) -> dict[str, Any]:
    """One line of output for one line of input."""
    found = rewards(model, group["prompt"], group["completions"])
    return {
        "rewards": found.tolist(),
        "advantages": advantages(found).tolist(),
        "best": group["completions"][int(found.argmax())],
    }


def main(argv: list[str]) -> None:
    """Judges the groups on standard input."""
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("model", help="the reward model, below the server's --root")
    parser.add_argument("--server", help="host:port; MOORAGE_SERVER by default")
    options = parser.parse_args(argv)
    with moorage.connect(options.server) as client:
        name = Path(options.model).name
        model = client.load(
            name, "internal", options.model, dtype="float32", lease=60, client_name="reward"
        )
        for line in sys.stdin:
            print(json.dumps(judged(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
