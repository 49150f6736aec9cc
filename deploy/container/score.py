"""Scores rows with a server in a container, and compares them with what transformers gave."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import moorage

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
NAME = "llama3"


def main(address: str, how: str) -> None:
    """Scores the plain rows of a golden checkpoint.

    Args:
        address: host:port of the server; its --root is `tests/golden`.
        how: "load" to load the model first, "restored" if it has to be there already.
    """
    with np.load(GOLDEN / NAME / "golden.npz") as stored:
        tokens, expected = stored["plain/tokens"], stored["plain/logprobs"]
        tolerance = 3 * float(stored["plain/noise"]) + 2e-5
    with moorage.connect(address, timeout=60) as client:
        if how == "load":
            client.load(NAME, "internal", NAME, compute_dtype="float32")
        (model,) = client.models()
        assert model.state == "ready", model.state
        scores = model.forward(tokens.tolist())
    found = np.stack(scores.logprobs)
    error = np.abs(found - expected)[:, 1:].max()
    print(f"         {found[0][1:4]}, off by {error:.1e} at the most, of {tolerance:.1e}")
    assert error <= tolerance


if __name__ == "__main__":
    main(*sys.argv[1:])
