"""Makes the golden checkpoints: tiny, random, with the numbers that transformers computes.

Needs torch==2.13.0 and transformers==4.57.1, which the project itself does not; run it by hand
when a variant is added. The same machine gives the same bytes.

    python tests/golden/make_golden.py [--only VARIANT]... [--out DIR]

Every variant becomes a folder beside this file: `config.json`, safetensors (one file, or several
and an index) and `golden.npz`. A case is a batch of B rows of T tokens; for each, `golden.npz` has

    <case>/tokens      int32 [B, T]       token ids; 0 at padding
    <case>/positions   int32 [B, T]       from 0 in every segment; 0 at padding
    <case>/segments    int32 [B, T]       from 1 in every row; 0 at padding. Token i sees token j
                                          if j <= i and both have the same segment, not 0, and in
                                          a sliding layer if also i - j < window
    <case>/logits      float32 [B, T, V]  of a language model, each segment run alone in float32
                                          with eager attention; 0 at padding
    <case>/scores      float32 [B, T, 1]  of a reward model, in place of logits and logprobs: the
                                          score head at every token
    <case>/logprobs    float32 [B, T]     log p(token | those before it in its segment), from a
                                          float64 run; NaN at first tokens and at padding
    <case>/noise       float32 []         the reference's own error: the largest difference of the
                                          float32 logits (scores) from the float64 run, and from
                                          the padded or packed batch
    <case>/bf16_error  float32 []         mean absolute difference of a bfloat16 run, loaded with
                                          dtype="bfloat16", over the tokens that are not padding

`plain` has, beside those,

    plain/hidden        float32 [2, B, T, D]  after half of the layers, and after the final norm
    plain/hidden_noise  float32 [2]           their largest difference from the float64 run

and the cases are `plain`, `right_pad`, `left_pad`, `long` (longer than the window of 8 and than
the original rotary length of 32) and `packed`.
"""

import argparse
import json
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import transformers as hf
from variants import VARIANTS, Variant

HIGHEST_TOKEN = 315  # below the placeholders of the multimodal variants

# The rows of each case as lengths of segments; a negative one is padding.
CASES = {
    "plain": [[20], [20]],
    "right_pad": [[20], [13, -7], [3, -17]],
    "left_pad": [[20], [-6, 14], [-18, 2]],
    "long": [[72], [34, -38]],
    "packed": [[13, 15, 8], [21, 5, -10], [1, 19, -16]],
}

# Mean and deviation by the first part of a name that fits; a matrix's deviation is for a fan-in of
# one. transformers' own start (0.02, norms of one) would hide most of what the tests look for.
WEIGHTS = {
    "q_norm.weight": (1.7, 0.25),
    "k_norm.weight": (1.7, 0.25),
    "norm.weight": (1.0, 0.25),
    "bias": (0.0, 0.4),
    "embed_tokens": (0.0, 2.5),
    "mlp.gate.weight": (0.0, 2.0),
    "q_proj": (0.0, 1.6),
    "k_proj": (0.0, 1.6),
    "": (0.0, 1.0),
}


def randomise(model: hf.PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")
    for name, parameter in sorted(model.named_parameters()):
        mean, deviation = next(entry for part, entry in WEIGHTS.items() if part in name)
        if gemma and "norm.weight" in name:
            mean -= 1.0
        if parameter.ndim > 1:
            deviation /= parameter.shape[-1] ** 0.5
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(mean + deviation * values)


def store(variant: Variant, seed: int, folder: pathlib.Path) -> None:
    model = variant.model(variant.model.config_class(**variant.settings))
    randomise(model, seed)
    exact = model.state_dict()
    tensors = model.to(variant.dtype).state_dict()
    if variant.float32:
        tensors |= {name: exact[name] for name in tensors if variant.float32 in name}
    if variant.tied_head_too:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    if variant.newer_names:
        model._checkpoint_conversion_mapping = {}
    model.save_pretrained(folder, state_dict=tensors, max_shard_size=variant.shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text()) | variant.more_config
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def only_float64() -> Iterator[None]:
    """Makes transformers' own casts to float32 (norms, softmax, rotary angles) go to float64."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    double = {"float32": torch.float64, "float": torch.float64}
    try:
        with (
            mock.patch.multiple(torch, **double),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(usual)


def draw_case(rows: list[list[int]], rng: np.random.Generator) -> dict[str, np.ndarray]:
    lengths = np.array([abs(n) for row in rows for n in row])
    numbers = np.concatenate([np.cumsum(np.array(row) > 0) * (np.array(row) > 0) for row in rows])
    segments = np.repeat(numbers, lengths)
    positions = np.concatenate([np.arange(n) for n in lengths]) * (segments > 0)
    tokens = rng.integers(3, HIGHEST_TOKEN, segments.shape, endpoint=True) * (segments > 0)
    flat = {"tokens": tokens, "positions": positions, "segments": segments}
    return {name: array.reshape(len(rows), -1).astype(np.int32) for name, array in flat.items()}


@torch.no_grad()
def run(model: hf.PreTrainedModel, tokens: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
    """Logits float64 [B, T, V], or a reward model's scores [B, T, 1] at every token."""
    arguments = {name: torch.from_numpy(array).long() for name, array in inputs.items()}
    arguments |= {"input_ids": torch.from_numpy(tokens).long(), "use_cache": False}
    if hasattr(model, "score"):
        return model.score(model.model(**arguments).last_hidden_state).double().numpy()
    return model(**arguments).logits.double().numpy()


@torch.no_grad()
def run_hidden(model: hf.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Hidden states float64 [2, B, T, D] of rows that are one segment each."""
    inputs = {"input_ids": torch.from_numpy(tokens).long(), "use_cache": False}
    found = model.model(**inputs, output_hidden_states=True).hidden_states
    return np.stack([x.double().numpy() for x in (found[len(found) // 2], found[-1])])


def run_alone(model: hf.PreTrainedModel, case: dict[str, np.ndarray]) -> np.ndarray:
    """Each segment by itself, which is what the segments mean; 0 at padding."""
    rows = []
    for tokens, segments in zip(case["tokens"], case["segments"], strict=True):
        parts = {s: run(model, tokens[None, segments == s])[0] for s in set(segments) - {0}}
        row = np.zeros((len(tokens), *parts[1].shape[1:]))
        for s, part in parts.items():
            row[segments == s] = part
        rows.append(row)
    return np.stack(rows)


def run_batch(model: hf.PreTrainedModel, case: dict[str, np.ndarray]) -> np.ndarray:
    """The whole batch at once; without a mask, transformers splits rows where positions restart."""
    real = case["segments"] > 0
    mask = {} if case["segments"].max() > 1 else {"attention_mask": real}
    outputs = run(model, case["tokens"], position_ids=case["positions"], **mask)
    return outputs * real[..., None]


def token_logprobs(logits: np.ndarray, case: dict[str, np.ndarray]) -> np.ndarray:
    tokens, segments = case["tokens"], case["segments"]
    chosen = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    scores = chosen - np.log(np.exp(logits[:, :-1]).sum(-1))
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return np.pad(np.where(follows, scores, np.nan), ((0, 0), (1, 0)), constant_values=np.nan)


def reference_runs(
    models: dict[str, hf.PreTrainedModel], case: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Everything in `golden.npz` about one case."""
    single, batch = run_alone(models["float32"], case), run_batch(models["float32"], case)
    half = run_alone(models["bfloat16"], case)
    with only_float64():
        double = run_alone(models["float64"], case)
    reward = single.shape[-1] == 1
    results = {"scores": single} if reward else {"logits": single}
    if not reward:
        results["logprobs"] = token_logprobs(double, case)
    results["noise"] = max(np.abs(single - double).max(), np.abs(single - batch).max())
    results["bf16_error"] = np.abs(half - single)[case["segments"] > 0].mean()
    return case | {name: np.float32(value) for name, value in results.items()}


def reference_hidden(
    models: dict[str, hf.PreTrainedModel], tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """What `golden.npz` has of hidden states."""
    single = run_hidden(models["float32"], tokens)
    with only_float64():
        double = run_hidden(models["float64"], tokens)
    noise = np.abs(single - double).max(axis=(1, 2, 3))
    return {"hidden": single.astype(np.float32), "hidden_noise": noise.astype(np.float32)}


def load(variant: Variant, folder: pathlib.Path) -> dict[str, hf.PreTrainedModel]:
    """The stored checkpoint, to run in each dtype."""
    models = {}
    for name in ("float32", "bfloat16"):
        models[name], problems = variant.model.from_pretrained(
            folder, dtype=name, attn_implementation="eager", output_loading_info=True
        )
        if any(problems.values()):
            raise ValueError(f"{folder.name} does not load cleanly: {problems}")
    with only_float64():
        models["float64"] = variant.model(models["float32"].config).double()
        models["float64"].load_state_dict(models["float32"].state_dict())
    return {name: model.eval() for name, model in models.items()}


def make(name: str, out: pathlib.Path) -> None:
    variant, seed, folder = VARIANTS[name], zlib.crc32(name.encode()), out / name
    shutil.rmtree(folder, ignore_errors=True)
    store(variant, seed, folder)
    models = load(variant, folder)
    rng = np.random.default_rng(seed)
    golden = {case: reference_runs(models, draw_case(rows, rng)) for case, rows in CASES.items()}
    golden["plain"] |= reference_hidden(models, golden["plain"]["tokens"])
    arrays = {f"{case}/{key}": a for case, entries in golden.items() for key, a in entries.items()}
    np.savez_compressed(folder / "golden.npz", **arrays)
    print(
        f"{name:20}",
        f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e3:4.0f} kB",
        f"noise {max(entries['noise'] for entries in golden.values()):.1e}",
        f"bf16 error {max(entries['bf16_error'] for entries in golden.values()):.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the golden checkpoints.")
    parser.add_argument("--only", action="append", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    arguments = parser.parse_args()
    hf.logging.disable_progress_bar()
    torch.set_num_threads(1)  # else the order of sums depends on the number of cores
    for name in arguments.only or VARIANTS:
        make(name, arguments.out)


if __name__ == "__main__":
    main()
