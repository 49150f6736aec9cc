"""The table of sources. Adding a source is one file and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moorage_models.errors import ModelError, Reason
from moorage_models.sources.gcs import open_bucket
from moorage_models.sources.huggingface import open_hub
from moorage_models.sources.internal import open_directory
from moorage_models.sources.kaggle import open_kaggle
from moorage_models.sources.source import ModelRequest, ModelSource, Policy, Repository


def _open_maxtext(request: ModelRequest, policy: Policy) -> Repository:
    """A MaxText checkpoint lies in a bucket or in a directory."""
    in_bucket = request.model_path.startswith("gs://")
    return open_bucket(request, policy) if in_bucket else open_directory(request, policy)


SOURCES: Mapping[ModelSource, Callable[[ModelRequest, Policy], Repository]] = {
    ModelSource.HUGGINGFACE: open_hub,
    ModelSource.KAGGLE: open_kaggle,
    ModelSource.GCS: open_bucket,
    ModelSource.INTERNAL: open_directory,
    ModelSource.MAXTEXT: _open_maxtext,
}


def open_repository(request: ModelRequest, policy: Policy) -> Repository:
    """Finds the checkpoint that a request names, reading metadata only.

    Raises:
        ModelError: SOURCE_NOT_ALLOWED if the policy excludes the source; otherwise as the source
            says.
    """
    allowed = tuple(SOURCES) if policy.sources is None else policy.sources
    if request.source not in SOURCES or request.source not in allowed:
        names = ", ".join(sorted(source.name for source in allowed))
        raise ModelError(
            Reason.SOURCE_NOT_ALLOWED,
            f"source {request.source.name} is not served here; served are: {names}",
        )
    return SOURCES[request.source](request, policy)


__all__ = [
    "SOURCES",
    "ModelRequest",
    "ModelSource",
    "Policy",
    "Repository",
    "open_repository",
]
