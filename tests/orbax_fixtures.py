"""Golden checkpoints rewritten as Orbax checkpoints: Flax Gemma as published, and MaxText.

Both writers start from a folder of Hugging Face tensors, and know nothing of the code that reads
what they write. In shapes: E width, F MLP width, X experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from numpy.typing import DTypeLike

from orbax_files import Arrays, Golden, Tree, nest, read_golden, resize, save_form, save_tree, shard
from orbax_tables import FORMS, FUSIONS, MAXTEXT, VISION


def write_flax(
    golden: Path,
    out: Path,
    *,
    ocdbt: bool = True,
    vocab_rows: int | None = None,
    gating: Literal["FD", "DF"] | None = None,
    nested: bool = False,
    dtype: DTypeLike | None = None,
) -> Path:
    """Writes a Gemma checkpoint as google-deepmind/gemma stores it.

    As in a download from Kaggle, a `tokenizer.model` (empty here) lies beside the Orbax folder.

    Args:
        golden: A folder of Gemma 1, 2 or 3 in Hugging Face's layout.
        out: The folder to write into.
        ocdbt: One OCDBT store, or a directory for every array.
        vocab_rows: Rows of the embedding; those above the golden's are zeros.
        gating: Gate and up as [2, F, E], or as [2, E, F], which Gemma 1 and Gemma 2 2B have.
            None is "DF" for Gemma 1 and "FD" for the others.
        nested: The model's own tree, which `gm.ckpts.save_params` writes, instead of the
            published flat keys with slashes.
        dtype: The stored dtype; None is the golden's.

    Returns:
        The Orbax folder. A reader should take `out` as well.
    """
    source = read_golden(golden, dtype)
    embedding = resize(source.text["embed_tokens.weight"], vocab_rows)
    arrays = {
        "transformer/embedder/input_embedding": embedding,
        "transformer/final_norm/scale": source.text["norm.weight"],
        **_vision(source, column=0),
    }
    for index in range(source.layers):
        for name, array in _flax_layer(source, index, gating or source.family.gating).items():
            arrays[f"transformer/layer_{index}/{name}"] = array
    tree = nest(_flax_nested(arrays)) if nested else _flax_flat(arrays)
    save_tree(out / golden.name, tree, ocdbt, zarr3=False)
    (out / "tokenizer.model").touch()
    return out / golden.name


def _flax_layer(source: Golden, index: int, gating: str) -> Arrays:
    layer, width, head_dim = source.layer(index), source.sizes["E"], source.sizes["D"]
    q, k, v = (
        layer[f"self_attn.{part}_proj.weight"].reshape(width, -1, head_dim).swapaxes(0, 1)
        for part in "qkv"
    )
    one = {"attn/qkv_einsum/w": np.stack([q, k, v])} if len(q) == len(k) else {}
    gate_up = np.stack([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]])
    return {
        **(one or {"attn/q_einsum/w": q, "attn/kv_einsum/w": np.stack([k, v])}),
        "attn/attn_vec_einsum/w": layer["self_attn.o_proj.weight"].reshape(-1, head_dim, width),
        "mlp/gating_einsum/w": gate_up if gating == "DF" else gate_up.swapaxes(1, 2),
        "mlp/linear/w": layer["mlp.down_proj.weight"],
        **{f"{flax}/scale": layer[f"{hf}.weight"] for hf, flax in source.family.flax.items()},
    }


def _flax_flat(arrays: Arrays) -> Tree:
    tree: Tree = {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition("/")
        tree.setdefault(module, {})[leaf] = array
    return tree


def _flax_nested(arrays: Arrays) -> Arrays:
    paths = {}
    for name, array in arrays.items():
        path = name.removeprefix("transformer/").replace("SigLiPFromPatches_0", "vision_encoder")
        paths[path.removesuffix("/w") if "/mlp/" in path else path] = array
    return paths


def write_maxtext(
    golden: Path,
    out: Path,
    *,
    scanned: bool,
    form: Literal["A", "B", "C", "D", "SFT", "RL"] = "A",
    ocdbt: bool = True,
    zarr3: bool = True,
    dtype: DTypeLike | None = None,
    devices: int | None = None,
    vocab_rows: int | None = None,
    metadata: bool = True,
    trained: bool = False,
    old_27b_query: bool = False,
    old_embedding: bool = False,
    old_gemma3: bool = False,
    fused_qkv: bool = False,
    fused_mlp: bool = False,
    prefuse_moe_weights: bool = False,
) -> Path:
    """Writes a checkpoint as MaxText's converters, trainers and exporters do.

    Args:
        golden: A folder in Hugging Face's layout, of a family in `FAMILIES`.
        out: The folder to write into.
        scanned: Layers stacked on axis 1, or a subtree for each.
        form: A is what converters and training write, B the export of a training run, C and D
            parameters saved to a path by Orbax v1 and v0, SFT and RL what post-training writes.
        ocdbt: One OCDBT store, or a directory for every array.
        zarr3: Arrays in zarr v3, or in v2.
        dtype: The stored dtype; None is float32. Gemma's norm scales stay float32 but in B.
        devices: Saved from arrays that are sharded over so many devices, a chunk for every shard;
            None saves numpy arrays whole.
        vocab_rows: Rows of the embedding and columns of the head; new ones are zeros.
        metadata: Whether form A's step says `scan_layers`, as newer versions have it.
        trained: Whether form A also holds the state of an optimizer and of random numbers.
        old_27b_query: Gemma 2's query times query_pre_attn_scalar ** -0.5, as the older converter
            has it for the 27B.
        old_embedding: Gemma 1 and 2 with sqrt(E) in bfloat16, as older converters have it.
        old_gemma3: All scanned layers of Gemma 3 in one stack, as the older converter has them.
        fused_qkv: The heads of query, key and value in one kernel.
        fused_mlp: Gate and up in one kernel, [E, 2, F].
        prefuse_moe_weights: The experts' gate and up in one array, [X, E, 2 * F].

    Returns:
        What a user gives as the path. A reader should take `out` as well.
    """
    source = read_golden(golden, np.float32)
    options = {"fused_qkv": fused_qkv, "fused_mlp": fused_mlp}
    options["prefuse_moe_weights"] = prefuse_moe_weights
    block = 1 if old_gemma3 else source.family.block
    stacks: dict[str, list[np.ndarray]] = {}
    for index in range(source.layers):
        for name, array in _fuse(_maxtext_layer(source, index, old_27b_query), options).items():
            path = _maxtext_path(source, index, block if scanned else 0, name)
            stacks.setdefault(path, []).append(array)
    arrays = _maxtext_outside(source, vocab_rows, old_embedding) | _vision(source, column=1)
    for path, stack in stacks.items():
        arrays[path] = np.stack(stack, axis=1) if path.startswith("decoder/layers/") else stack[0]
    stored = _cast(arrays, dtype, bool(source.family.offset) and form != "B")
    tree = _maxtext_tree(stored, form, devices, trained)
    said = {"scan_layers": scanned} if metadata and form == "A" else {}
    return save_form(out, form, tree, ocdbt, zarr3, said)


def _maxtext_layer(source: Golden, index: int, old_27b_query: bool) -> Arrays:
    """A layer's parameters by their paths, folded."""
    family, sizes = source.family, {**source.sizes, "-": -1}
    norms = {f"{hf}.weight": (f"{norm}/scale", ("E",)) for hf, norm in family.norms.items()}
    scalar = source.config["query_pre_attn_scalar"] if old_27b_query else sizes["D"]
    interleaved = (source.config.get("rope_scaling") or {}).get("rope_type") == "llama3"
    arrays = {}
    for hf, array in source.layer(index).items():
        path, shape = (MAXTEXT | norms)[hf]
        array = array.reshape([sizes[size] for size in shape])
        if path.endswith("/scale"):
            array = array + np.float32(family.offset)
        if family.query and path == "self_attention/query/kernel":
            array = array * np.float32(scalar**-0.5)
        if interleaved and path in ("self_attention/query/kernel", "self_attention/key/kernel"):
            array = np.stack(np.split(array, 2, axis=-1), axis=-1).reshape(array.shape)
        arrays[path] = array
    return arrays


def _maxtext_path(source: Golden, index: int, block: int, name: str) -> str:
    """Where a layer's parameter lies; `block` is 0 for layers that are not scanned."""
    module, _, rest = name.partition("/")
    whole = source.layers - source.layers % max(block, 1)
    if source.family.pairs:
        module += ("_local", "_global")[index % 2]
        index //= 2
    if block == 0:
        layer = f"layers_{index}"
    elif block == 1:
        layer = "layers"
    else:
        layer = f"{'layers' if index < whole else 'layers_remainder'}/layers_{index % block}"
    return f"decoder/{layer}/{module}/{rest}"


def _maxtext_outside(source: Golden, vocab_rows: int | None, old_embedding: bool) -> Arrays:
    """What is not in a layer."""
    table, family = resize(source.text["embed_tokens.weight"], vocab_rows), source.family
    if family.embedding:
        rounded = "bfloat16" if old_embedding else family.embedding
        table = table * np.asarray(source.sizes["E"] ** 0.5, rounded).astype(np.float32)
    arrays = {
        "token_embedder/embedding": table,
        "decoder/decoder_norm/scale": source.text["norm.weight"] + np.float32(family.offset),
    }
    if "lm_head.weight" in source.text:
        arrays["decoder/logits_dense/kernel"] = resize(source.text["lm_head.weight"], vocab_rows).T
    return arrays


def _fuse(layer: Arrays, options: Mapping[str, bool]) -> Arrays:
    for fusion in (fusion for name, on in options.items() if on for fusion in FUSIONS[name]):
        if fusion.parts[0] in layer:
            layer[fusion.whole] = fusion.join([layer.pop(part) for part in fusion.parts])
    return layer


def _cast(arrays: Arrays, dtype: DTypeLike | None, scales_in_float32: bool) -> Arrays:
    dtype = np.float32 if dtype is None else dtype
    kept = ("/scale",) if scales_in_float32 else ()
    return {path: a if path.endswith(kept) else a.astype(dtype) for path, a in arrays.items()}


def _maxtext_tree(arrays: Arrays, form: str, devices: int | None, trained: bool) -> Tree:
    prefix, suffix = FORMS[form].prefix, FORMS[form].suffix
    params = {
        path: array if devices is None else shard(array, devices) for path, array in arrays.items()
    }
    tree = nest({prefix + path + suffix: array for path, array in params.items()})
    if form == "A" and trained:
        count, moments = np.zeros((), np.int32), jax.tree.map(np.zeros_like, tree["params"])
        adam = {"count": count, "mu": moments, "nu": moments}
        tree["nnx_aux"] = nest({"model/decoder/dropout/rngs/params/count": count})
        tree |= {"step": count, "opt_state": [adam, None, {"count": count}]}
    elif form == "A":
        tree |= {"step": 0, "opt_state": {}}
    return tree


def _vision(source: Golden, column: int) -> Arrays:
    """The vision side's tensors under their paths in Flax (column 0) or MaxText (1)."""
    arrays = {}
    for name, array in source.vision.items():
        for path in (paths[column] for tail, paths in VISION.items() if name.endswith(tail)):
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
            arrays[path] = array + array.dtype.type(column) if path.endswith("/scale") else array
    return arrays
