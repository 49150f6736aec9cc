"""One contestant scores random ids whenever it is told to, in this process.

    python benchmarks/forward_peers.py torch FOLDER --dtype float32 < SHAPES > SECONDS

Every line that comes in is `rows length`, every line that goes out is JSON: the seconds of one pass
and the mean of its log-probabilities, by which one sees that all do the same; or first of all what
is missing. Each gives per-token log-probabilities as numpy. Needs the contestant's packages and
numpy, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np

#: From ids [rows, length] to the log-probability of each token but the first of each row.
Score = Callable[[np.ndarray], np.ndarray]

#: What is asked of; the ids of 3 to so many are in every vocabulary and stand for nothing special.
_LAST_ID = 49_000


def ours(folder: Path, dtype: str) -> Score:
    from in_process import Model

    return Model(folder, dtype, [(1, 128), (8, 512)]).score


def torch(folder: Path, dtype: str) -> Score:
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()

    @torch.inference_mode()
    def score(ids: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(ids).long()
        logits = model(tokens, use_cache=False).logits[:, :-1]
        found = [  # row by row: all at once takes the memory of the logits again
            torch.log_softmax(row.float(), -1).gather(-1, targets[:, None])[:, 0]
            for row, targets in zip(logits, tokens[:, 1:], strict=True)
        ]
        return torch.stack(found).numpy()

    return score


def tunix(folder: Path, dtype: str) -> Score:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.rl.common import compute_per_token_logps

    said = json.loads((folder / "config.json").read_text())
    make = {"llama": _tunix_llama, "gemma3_text": _tunix_gemma3}[said["model_type"]]
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto)
    model = make(folder, said, mesh, jnp.dtype(dtype))
    graph, state = nnx.split(model)

    def score(ids: np.ndarray) -> np.ndarray:
        found = compute_per_token_logps(graph, state, ids[:, :1], ids[:, 1:], pad_id=0, eos_id=1)
        return np.asarray(found)

    return score


def _tunix_llama(folder: Path, said: dict[str, Any], mesh: Any, dtype: Any) -> Any:
    from tunix.models.llama3.model import ModelConfig
    from tunix.models.llama3.params import create_model_from_safe_tensors

    config = ModelConfig(
        num_layers=said["num_hidden_layers"],
        vocab_size=said["vocab_size"],
        embed_dim=said["hidden_size"],
        hidden_dim=said["intermediate_size"],
        num_heads=said["num_attention_heads"],
        head_dim=said["hidden_size"] // said["num_attention_heads"],
        num_kv_heads=said["num_key_value_heads"],
        rope_theta=said["rope_theta"],
        norm_eps=said["rms_norm_eps"],
        weight_tying=said["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(str(folder), config, mesh, dtype)


def _tunix_gemma3(folder: Path, said: dict[str, Any], mesh: Any, dtype: Any) -> Any:
    from tunix.models.gemma3.model import ModelConfig
    from tunix.models.gemma3.params_safetensors import create_model_from_safe_tensors

    return create_model_from_safe_tensors(str(folder), ModelConfig.gemma3_270m(), mesh, dtype)


CONTESTANTS = {"ours": ours, "torch": torch, "tunix": tunix}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed goes elsewhere

    def answer(**said: object) -> None:
        print(json.dumps(said), file=answers, flush=True)

    try:
        score = CONTESTANTS[args.contestant](args.folder, args.dtype)
    except Exception as error:  # the one who asks goes on without it
        answer(missing=f"{type(error).__name__}: {error}"[:300])
        return
    answer(ready=True)
    for line in sys.stdin:
        rows, length = map(int, line.split())
        ids = np.random.default_rng(0).integers(3, _LAST_ID, (rows, length), dtype=np.int32)
        begin = time.perf_counter()
        found = score(ids)
        seconds = time.perf_counter() - begin
        answer(seconds=seconds, mean=float(np.nanmean(found)))


if __name__ == "__main__":
    main()
