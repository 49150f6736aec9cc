"""What the server says of a model's layout is how jax holds the arrays."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest

import moorage
from checkpoints import GOLDEN, mesh_of, open_folder
from engine_double import EngineDouble
from moorage_models.automodel import load
from moorage_server import convert
from status_server import status_server


def slice_of(
    shape: Sequence[int], axes: Sequence[str], mesh: dict[str, int], at: dict[str, int]
) -> tuple[slice, ...]:
    """What the protocol says that the device at some place of the mesh holds."""
    found = []
    for size, names in zip(shape, axes, strict=True):
        split = names.split(",") if names else []
        index = 0
        for name in split:  # the outer one first
            index = index * mesh[name] + at[name]
        part = size // math.prod(mesh[name] for name in split)
        found.append(slice(index * part, (index + 1) * part))
    return tuple(found)


@pytest.mark.parametrize("sizes", [(2, 2), (4, 2), (1, 3)])
@pytest.mark.parametrize("name", ["llama3", "gemma3_text_mqa", "qwen3_moe"])
def test_each_device_holds_what_the_layout_says(name, sizes):
    mesh, checkpoint = mesh_of(*sizes), open_folder(GOLDEN / name)
    shape = {"fsdp": sizes[0], "tp": sizes[1]}
    params, _ = load(checkpoint, mesh)
    layout = convert.to_layout(checkpoint.plan, shape)
    assert {parameter.name for parameter in layout} == params.keys()
    places = {
        mesh.devices[row, column].id: {"fsdp": row, "tp": column}
        for row in range(sizes[0])
        for column in range(sizes[1])
    }
    for parameter in layout:
        array = params[parameter.name]
        assert (tuple(parameter.shape), parameter.dtype) == (array.shape, array.dtype.name)
        for shard in array.addressable_shards:
            told = slice_of(parameter.shape, parameter.axes, shape, places[shard.device.id])
            held = tuple(
                slice(*part.indices(size)[:2])
                for part, size in zip(shard.index, array.shape, strict=True)
            )
            assert told == held, parameter.name
    sizes_in_order = [params[parameter.name].nbytes for parameter in layout]
    assert sizes_in_order == sorted(sizes_in_order, reverse=True)


def test_the_client_gives_it():
    async def run():
        async with status_server(EngineDouble(), GOLDEN) as server:
            async with moorage.aio.connect(server.address) as client:
                model = await client.load("a", "internal", "llama3")
                found = await client.layout(model)
                with pytest.raises(moorage.NotFound):
                    await client.layout("nothing")

            def ask():
                with moorage.connect(server.address) as blocking:
                    return blocking.layout(model.handle)

            assert await asyncio.to_thread(ask) == found
            return {parameter.name: parameter for parameter in found}

    found = asyncio.run(run())
    assert found["embed"] == moorage.ParameterLayout("embed", (320, 64), "bfloat16", (("tp",), ()))
    assert found["layers.attn.o"].axes == ((), (), ("tp",))
    assert found["final_norm"].axes == ((),)
