"""The table of sources. Adding a source is one file and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moorage_models.errors import ModelError, Reason
from moorage_models.sources.huggingface import open_hub
from moorage_models.sources.internal import open_directory
from moorage_models.sources.source import ModelRequest, ModelSource, Policy, Repository

SOURCES: Mapping[ModelSource, Callable[[ModelRequest, Policy], Repository]] = {
    ModelSource.HUGGINGFACE: open_hub,
    ModelSource.INTERNAL: open_directory,
    ModelSource.MAXTEXT: open_directory,
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
