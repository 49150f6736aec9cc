"""Makes rotary.npz: the rotary frequencies of every preset, as transformers computes them.

Needs torch==2.13.0 and transformers==4.57.1, which the project itself does not.

    python tests/data/rotary/make_rotary.py

`<head_dim> <theta> <kind> <factor>` is float32 [head_dim / 2], in radians a position; the kind is
`default`, `linear` or `llama3`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SETS = (
    *((128, theta, "default", 1.0) for theta in (1e4, 5e5, 1e6, 5e6, 1e7)),
    *((256, theta, "default", 1.0) for theta in (1e4, 1e6)),
    *((64, theta, "default", 1.0) for theta in (1e4, 1e6)),
    *((head_dim, 1e6, "linear", 8.0) for head_dim in (128, 256)),
    *((head_dim, 5e5, "llama3", 32.0) for head_dim in (64, 128)),
    (128, 5e5, "llama3", 8.0),
)


def frequencies(head_dim: int, theta: float, kind: str, factor: float) -> np.ndarray:
    more = LLAMA3 if kind == "llama3" else {}
    scaling = None if kind == "default" else {"rope_type": kind, "factor": factor, **more}
    config = LlamaConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    return LlamaRotaryEmbedding(config).inv_freq.numpy()


if __name__ == "__main__":
    found = {" ".join(map(str, one)): frequencies(*one) for one in SETS}
    np.savez_compressed(Path(__file__).with_name("rotary.npz"), **found)
