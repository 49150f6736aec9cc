"""Makes the reference numbers of the real checkpoints: what transformers computes for five texts.

Needs torch==2.13.0 and transformers==4.57.1, which the project itself does not. The checkpoints
are those of examples/real_models.py; each given folder becomes <its name>.npz beside this file.

    python tests/data/real/make_real.py FOLDER...

For text i, from a run in float64 throughout, rotary angles included, on the bfloat16 weights:

    ids/<i>         int32 [T]       tokens of the text, with what the tokenizer puts before it
    logprobs/<i>    float64 [T-1]   log p(token t+1 | tokens up to t)

Transformers in float32 is off by 1e-4 at the most, on Gemma's long text, and by 2e-6 on average.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "golden"))

from make_golden import only_float64

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13",
    "Привет, мир! こんにちは世界。 naïve café 🙂",
    " ".join(f"Line {i}: the value of item number {i} is {i * i}." for i in range(60)),
)


@torch.no_grad()
def measure(model: hf.PreTrainedModel, ids: list[int]) -> dict[str, np.ndarray]:
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    chosen = logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    return {"ids": np.int32(ids), "logprobs": (chosen - logits.logsumexp(-1)).numpy()}


def make(folder: pathlib.Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    single = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="eager"
    )
    arrays = {}
    with only_float64():
        model = hf.AutoModelForCausalLM.from_config(single.config, attn_implementation="eager")
        model.double().load_state_dict(single.state_dict())
        for i, text in enumerate(TEXTS):
            results = measure(model, tokenizer.encode(text).ids)
            arrays |= {f"{key}/{i}": array for key, array in results.items()}
            print(folder.name, i, len(results["ids"]), "tokens, mean", results["logprobs"].mean())
    path = pathlib.Path(__file__).with_name(f"{folder.name}.npz")
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    hf.logging.disable_progress_bar()
    for argument in sys.argv[1:]:
        make(pathlib.Path(argument).resolve())
