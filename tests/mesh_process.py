"""One of the two processes that test_two_processes joins to a mesh: it loads, checks and scores.

    python mesh_process.py ADDRESS PROCESS FOLDER

What it found goes to `FOLDER/found-PROCESS.json`, its log-probabilities to `scores-PROCESS.npy`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from checkpoints import GOLDEN, mesh_of, open_folder, stored_tensors
from moorage_models.arena import Arena
from moorage_models.automodel import load
from moorage_models.decoder import Decoder
from moorage_models.placement import ArenaPlacer, Placer
from moorage_models.ring import RingPlacer

LAYERS = 2
CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16",
    "vocab_size": 16_384, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
    "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 8,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
    "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip

#: By the decoder's name of a parameter, that of its tensors and their shape.
TENSORS = {
    "embed": ("model.embed_tokens.weight", (16_384, 1024)),
    "final_norm": ("model.norm.weight", (1024,)),
    "layers.attn_norm": ("model.layers.#.input_layernorm.weight", (1024,)),
    "layers.attn.q": ("model.layers.#.self_attn.q_proj.weight", (2048, 1024)),
    "layers.attn.k": ("model.layers.#.self_attn.k_proj.weight", (1024, 1024)),
    "layers.attn.v": ("model.layers.#.self_attn.v_proj.weight", (1024, 1024)),
    "layers.attn.o": ("model.layers.#.self_attn.o_proj.weight", (1024, 2048)),
    "layers.attn.q_norm": ("model.layers.#.self_attn.q_norm.weight", (128,)),
    "layers.attn.k_norm": ("model.layers.#.self_attn.k_norm.weight", (128,)),
    "layers.mlp_norm": ("model.layers.#.post_attention_layernorm.weight", (1024,)),
    "layers.mlp.gate": ("model.layers.#.mlp.gate_proj.weight", (3072, 1024)),
    "layers.mlp.up": ("model.layers.#.mlp.up_proj.weight", (3072, 1024)),
    "layers.mlp.down": ("model.layers.#.mlp.down_proj.weight", (1024, 3072)),
}

TOKENS = np.random.default_rng(1).integers(0, 16_384, (4, 32), np.int32)

#: The ring has room for chunks of 1.6 MiB: every matrix takes several.
PLACERS: dict[str, Placer] = {"arena": ArenaPlacer(Arena()), "ring": RingPlacer(40 << 20)}


def make(folder: Path) -> int:
    """Writes the checkpoint, random and in two files; returns the bytes of its tensors."""
    numbers = np.random.default_rng(0)
    files: list[dict[str, np.ndarray]] = [{}, {}]
    for name, (template, shape) in TENSORS.items():
        for layer in range(LAYERS if "#" in template else 1):
            spread = np.float32(0.02 if len(shape) > 1 else 0.5)
            values = numbers.standard_normal(shape, np.float32) * spread
            tensor = values.astype(jnp.bfloat16)
            files[name != "embed"][template.replace("#", str(layer))] = tensor
    index = {}
    for number, tensors in enumerate(files, start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return sum(tensor.nbytes for tensors in files for tensor in tensors.values())


def scores(folder: Path, mesh: Mesh, params: dict[str, jax.Array]) -> np.ndarray:
    """Log-probabilities of every token after the first, in float32: `float32[4, 31]`."""
    decoder = Decoder(open_folder(folder).config, mesh, params, "float32")

    def score(decoder: Decoder, tokens: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(decoder(tokens)[0][:, :-1])
        return jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0]

    everywhere = NamedSharding(mesh, PartitionSpec())
    return np.asarray(jax.jit(score, out_shardings=everywhere)(decoder, TOKENS))


def bytes_read() -> int:
    """What this process has read so far, as the kernel counts it: from any file, cached or not."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def measured(
    folder: Path, mesh: Mesh, placer: Placer
) -> tuple[dict[str, jax.Array], dict[str, object]]:
    load(open_folder(GOLDEN / "qwen3_tied"), mesh, placer=placer)  # jax reads modules of its own
    before = bytes_read()
    params, _ = load(open_folder(folder), mesh, placer=placer)
    jax.block_until_ready(params)
    read = bytes_read() - before
    held = {
        (name, str(shard.index)): shard.data.nbytes
        for name, array in params.items()
        for shard in array.addressable_shards
    }
    return params, {"read": read, "share": sum(held.values()), "wrong": wrong(folder, params)}


def wrong(folder: Path, params: dict[str, jax.Array]) -> list[str]:
    """The parameters of which a device here holds other bits than the files, or another shape."""
    stored = stored_tensors(folder)
    found = []
    for name, (template, shape) in TENSORS.items():
        layers = [stored[template.replace("#", str(layer))] for layer in range(LAYERS)]
        whole = np.stack(layers) if "#" in template else layers[0]
        assert whole.shape[-len(shape) :] == shape
        array = params[name]
        right = array.shape == whole.shape and array.dtype == whole.dtype
        shards = array.addressable_shards
        if not right or not all(same(shard.data, whole[shard.index]) for shard in shards):
            found.append(name)
    return found + sorted(params.keys() - TENSORS.keys())


def same(held: jax.Array, wanted: np.ndarray) -> bool:
    return np.array_equal(np.asarray(held).view(np.uint16), wanted.view(np.uint16))


def main(address: str, process: int, folder: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(
        address,
        num_processes=2,
        process_id=process,
        coordinator_bind_address=address,
        initialization_timeout=30,
        heartbeat_timeout_seconds=20,
    )
    mesh = mesh_of(4, 2)
    found = {}
    for name, placer in PLACERS.items():
        params, found[name] = measured(folder, mesh, placer)
    (folder / f"found-{process}.json").write_text(json.dumps(found))
    np.save(folder / f"scores-{process}.npy", scores(folder, mesh, params))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
