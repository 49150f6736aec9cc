"""One contestant loads one checkpoint, in this process; prints one line of JSON.

    python benchmarks/load_peers.py ours FOLDER --again 2

The first load is the first in its process, and its memory is watched; the read limit is measured
after it, so that no memory is handed on. Then the model is dropped and loaded again, with the read
limit right before or right after: they take turns, as a disk's host may cache. Needs the
contestant's packages and numpy, no more.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from load_limits import ReadLimit, back_memory, evict, peak_growth, warm

MESH = {"fsdp": 4, "tp": 2}
_KEPT_BYTES = 1 << 40  # all that a model leaves behind

#: Loads a model and returns what holds it, once every byte is where it belongs.
Load = Callable[[], object]


def ours(folder: Path) -> Load:
    """With an arena that keeps what one model leaves behind for the next."""
    import jax

    from moorage_models.arena import Arena
    from moorage_models.automodel import load as place
    from moorage_models.checkpoint import open_checkpoint
    from moorage_models.placement import ArenaPlacer
    from moorage_models.sources import ModelRequest, ModelSource

    mesh, placer = _mesh(), ArenaPlacer(Arena(_KEPT_BYTES))
    request = ModelRequest(folder.name, ModelSource.INTERNAL, str(folder))

    def load() -> object:
        params, _ = place(open_checkpoint(request), mesh, placer=placer)
        return jax.block_until_ready(params)

    return load


def tunix(folder: Path) -> Load:
    import jax
    from flax import nnx
    from tunix.models.qwen3.model import ModelConfig
    from tunix.models.qwen3.params import create_model_from_safe_tensors

    mesh, said = _mesh(), json.loads((folder / "config.json").read_text())
    names = {
        "num_layers": "num_hidden_layers",
        "vocab_size": "vocab_size",
        "embed_dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "num_heads": "num_attention_heads",
        "head_dim": "head_dim",
        "num_kv_heads": "num_key_value_heads",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "use_tied_embedding": "tie_word_embeddings",
    }
    config = ModelConfig(**{field: said[key] for field, key in names.items()})

    def load() -> object:
        model = create_model_from_safe_tensors(str(folder), config, mesh)
        jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
        return model

    return load


def device_put(folder: Path) -> Load:
    """Reads a tensor at a time with the safetensors library, and places each."""
    import jax
    import ml_dtypes  # noqa: F401 - without it safetensors knows no bfloat16
    from safetensors import safe_open

    mesh = _mesh()

    def load() -> object:
        params = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    tensor = file.get_tensor(name)
                    params[name] = jax.device_put(tensor, _sharding(tensor.shape, mesh))
        return jax.block_until_ready(params)

    return load


def fastsafetensors(folder: Path) -> Load:
    """Into the host's memory with torch, and nowhere else."""
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    paths = [str(path) for path in sorted(folder.glob("*.safetensors"))]

    def load() -> object:
        loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
        loader.add_filenames({0: paths})
        buffer = loader.copy_files_to_device()
        tensors = {name: buffer.get_tensor(name) for name in buffer.key_to_rank_lidx}
        _touch(torch, tensors.values())
        return loader, buffer, tensors

    return load


def transformers(folder: Path) -> Load:
    """Into the host's memory with torch; pages that are mapped count once they are touched."""
    import torch
    from transformers import AutoModelForCausalLM

    def load() -> object:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        _touch(torch, model.parameters())
        return model

    return load


def orbax_standard(folder: Path) -> Load:
    return _orbax(folder, "StandardCheckpointer")


def orbax_pytree(folder: Path) -> Load:
    return _orbax(folder, "PyTreeCheckpointer")


def _orbax(folder: Path, kind: str) -> Load:
    import jax
    import orbax.checkpoint as ocp

    mesh, path = _mesh(), next(folder.rglob("_METADATA")).parent.absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = dict(checkpointer.metadata(path).item_metadata.tree)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=_sharding(leaf.shape, mesh)
        ),
        tree,
    )
    arguments = ocp.checkpoint_utils.construct_restore_args(target)

    def load() -> object:
        with getattr(ocp, kind)() as checkpointer:
            if kind == "StandardCheckpointer":
                restored = checkpointer.restore(path, target)
            else:
                restored = checkpointer.restore(path, item=target, restore_args=arguments)
        return jax.block_until_ready(restored)

    return load


CONTESTANTS: Mapping[str, Callable[[Path], Load]] = {
    "ours": ours,
    "tunix": tunix,
    "device_put": device_put,
    "fastsafetensors": fastsafetensors,
    "transformers": transformers,
    "orbax_standard": orbax_standard,
    "orbax_pytree": orbax_pytree,
}


def _mesh() -> Any:
    """The mesh, whose devices have been used once."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()).reshape(tuple(MESH.values())), tuple(MESH))
    everywhere = NamedSharding(mesh, PartitionSpec(tuple(MESH)))
    jax.block_until_ready(jax.device_put(np.zeros(mesh.size, np.float32), everywhere))
    return mesh


def _sharding(shape: Sequence[int], mesh: Any) -> Any:
    """Each axis of the mesh over the next axis of the array that it divides."""
    from jax.sharding import NamedSharding, PartitionSpec

    left, spec = list(MESH), []
    for size in shape:
        divides = bool(left) and size >= 8 and size % MESH[left[0]] == 0
        spec.append(left.pop(0) if divides else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _touch(torch: Any, tensors: Any) -> None:
    for tensor in tensors:
        tensor.detach().reshape(-1).view(torch.uint8)[::4096].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--again", type=int, default=0, help="loads after the first")
    parser.add_argument("--cold", action="store_true", help="again from the disk, by O_DIRECT")
    parser.add_argument("--memory", action="store_true", help="watch one load, which slows it")
    args = parser.parse_args()
    try:
        load = CONTESTANTS[args.contestant](args.folder)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    warm(args.folder)
    back_memory(args.folder)
    if args.memory:
        with peak_growth() as memory:
            model = load()
        del model
        print(json.dumps(memory))
    else:
        print(json.dumps(run(load, args.folder, args.again, args.cold)))


def run(load: Load, folder: Path, again: int, cold: bool) -> list[dict[str, Any]]:
    """Seconds and CPU seconds of every load, and the seconds of the read limit beside it."""
    first, model = _timed(load)
    del model
    gc.collect()
    ready = partial(evict if cold else warm, folder)
    limit = ReadLimit(folder, cold)
    loads = [first | {"limit": _limited(limit, ready)}]
    for turn in range(again):
        before = _limited(limit, ready) if turn % 2 == 0 else None
        ready()
        more, model = _timed(load)
        del model
        gc.collect()
        after = _limited(limit, ready) if before is None else before
        loads.append(more | {"limit": after})
    return loads


def _limited(limit: ReadLimit, ready: Callable[[], None]) -> dict[str, float]:
    ready()
    return limit.seconds()


def _timed(load: Load) -> tuple[dict[str, float], object]:
    begin, cpu = time.perf_counter(), time.process_time()
    model = load()
    seconds, used = time.perf_counter() - begin, time.process_time() - cpu
    return {"seconds": seconds, "cpu": used}, model


if __name__ == "__main__":
    main()
