"""Loads models in process, without a server."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike

from moorage_models.arena import Arena
from moorage_models.checkpoint import Checkpoint, open_checkpoint
from moorage_models.config import ModelConfig
from moorage_models.decoder import Decoder
from moorage_models.monitor import LoadMonitor
from moorage_models.placement import ArenaPlacer, Placer, place
from moorage_models.provenance import require_unchanged
from moorage_models.reading import Arrivals, LocalFiles
from moorage_models.ring import WINDOW_BYTES, RingPlacer
from moorage_models.sources import ModelRequest, ModelSource
from moorage_models.streaming import RangedFiles
from moorage_models.tree_placement import place_tree


class AutoModel:
    """Loads a model by its id, as Tunix's class of this name does."""

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        mesh: Mesh,
        model_source: ModelSource = ModelSource.HUGGINGFACE,
        model_path: str | None = None,
        model_download_path: str | None = None,
        *,
        revision: str = "",
        dtype: DTypeLike | None = None,
        compute_dtype: DTypeLike | None = None,
        config: ModelConfig | None = None,
        options: Mapping[str, str] | None = None,
        stream: bool = False,
    ) -> tuple[Decoder, str]:
        """Finds, checks, fetches and places a model.

        Args:
            model_id: A Hugging Face id, or a config id.
            mesh: The device mesh, with axes among `fsdp` and `tp`.
            model_source: Where the checkpoint is kept.
            model_path: Where within the source.
            model_download_path: Where files are put; the source's own cache if left out.
            revision: A branch, tag or commit.
            dtype: Dtype of the parameters; as stored if left out.
            compute_dtype: Dtype of the arithmetic; the parameters' if left out.
            config: Overrides the checkpoint's own configuration.
            options: What a MaxText checkpoint does not tell of itself; see
                `families.maxtext.choose`.
            stream: Whether weights go from a hub to the devices without a copy on this machine;
                see `load`.

        Returns:
            The model, and the path that it was read from.

        Raises:
            ModelError: Whatever stands in the way, before anything is fetched where possible.
        """
        request = ModelRequest(
            model_id,
            ModelSource(model_source),
            model_path or "",
            revision,
            model_download_path or "",
            _name(dtype),
            _name(compute_dtype),
            tuple(sorted((options or {}).items())),
        )
        checkpoint = open_checkpoint(request, config=config)
        mesh = auto_mesh(mesh)
        params, path = load(checkpoint, mesh, stream=stream)
        return Decoder(checkpoint.config, mesh, params, checkpoint.compute_dtype), path


def create_model_from_safe_tensors(
    file_dir: str, config: ModelConfig | None, mesh: Mesh, dtype: DTypeLike | None = None
) -> Decoder:
    """Loads a Hugging Face folder, as Tunix's function of this name does.

    Args:
        file_dir: The folder, or the `gs://` prefix.
        config: The configuration; the folder's own `config.json` if None.
        mesh: The device mesh.
        dtype: Dtype of the parameters; as stored if left out.

    Raises:
        ModelError: Whatever stands in the way.
    """
    source = ModelSource.GCS if file_dir.startswith("gs://") else ModelSource.INTERNAL
    model, _ = AutoModel.from_pretrained(
        Path(file_dir).name, mesh, source, file_dir, dtype=dtype, config=config
    )
    return model


def load(
    checkpoint: Checkpoint,
    mesh: Mesh,
    monitor: LoadMonitor | None = None,
    placer: Placer | None = None,
    *,
    stream: bool = False,
) -> tuple[dict[str, jax.Array], str]:
    """Fetches a checkpoint and places it on a mesh: all loads, in process or not, go here.

    Args:
        checkpoint: What to load.
        mesh: The device mesh, axes Auto.
        monitor: Told of progress; may cancel the load.
        placer: How bytes come into device memory; by the kind of the devices if None.
        stream: Whether safetensors of a hub go to the devices without a copy on this machine, each
            process reading what its devices hold. No digest is compared then. What this machine
            holds already, or has a download path, is read from the disk all the same.

    Returns:
        The parameters by name, and where they were read from: a folder, or a place on a hub.

    Raises:
        ModelError: The source failed, the files are damaged or have changed since the checkpoint
            was opened, or the load was cancelled.
    """
    monitor, placer = monitor or LoadMonitor(), placer or placer_for(mesh)
    loaded = _load(checkpoint, mesh, monitor, placer, stream)
    require_unchanged(checkpoint.repository, checkpoint.claims)
    return loaded


def _load(
    checkpoint: Checkpoint, mesh: Mesh, monitor: LoadMonitor, placer: Placer, stream: bool
) -> tuple[dict[str, jax.Array], str]:
    """By way of the disk, or past it."""
    repository, plan = checkpoint.repository, checkpoint.plan
    folder = repository.destination
    if checkpoint.orbax is not None:
        repository.fetch(plan.files, monitor)
        folder /= checkpoint.orbax
        return place_tree(plan, folder, mesh, monitor, placer), str(folder)
    if stream and repository.local is None and not checkpoint.request.download_path:
        with RangedFiles(repository, monitor) as files:
            return place(plan, files, mesh, monitor, placer), repository.label
    return _fetch_and_place(checkpoint, mesh, monitor, placer), str(folder)


def _fetch_and_place(
    checkpoint: Checkpoint, mesh: Mesh, monitor: LoadMonitor, placer: Placer
) -> dict[str, jax.Array]:
    """Places files as they arrive."""
    repository, plan, arrivals = checkpoint.repository, checkpoint.plan, Arrivals()
    with (
        ThreadPoolExecutor(1, "load") as pool,
        LocalFiles(repository.destination, arrivals, repository.roots) as files,
    ):
        fetching = pool.submit(repository.fetch, plan.files, monitor, arrivals.add)
        fetching.add_done_callback(lambda _: arrivals.close())
        try:
            params = place(plan, files, mesh, monitor, placer)
            fetching.result()
            files.check_unchanged()
        except BaseException:
            if fetching.done():
                fetching.result()  # what ended the fetch ended the placement, too
            monitor.cancel()
            raise
    return params


def placer_for(mesh: Mesh, arena: Arena | None = None, window: int = WINDOW_BYTES) -> Placer:
    """How bytes come onto a mesh's kind of devices.

    Args:
        mesh: The device mesh.
        arena: For CPU devices, where their memory comes from; by default nothing is kept of it.
        window: For accelerators, bytes of host memory that a load may take.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return ArenaPlacer(arena or Arena()) if on_cpu else RingPlacer(window)


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same mesh with Auto axes; `jax.make_mesh` makes Explicit ones by default."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _name(dtype: DTypeLike | None) -> str:
    if dtype is None:
        return ""
    return dtype if isinstance(dtype, str) else np.dtype(dtype).name
