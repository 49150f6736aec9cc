"""How the errors of the Hugging Face Hub's client are sorted."""

from __future__ import annotations

from huggingface_hub import errors

from moorage_models.errors import Reason
from moorage_models.sources.failures import Failures

_ACCESS = (
    "accept the terms on the model's page, and set HF_TOKEN on the server to a token of an "
    "account that may read it"
)

FAILURES = Failures(
    title="the Hugging Face Hub",
    cache_setting="HF_HOME",
    credential="HF_TOKEN",
    access=_ACCESS,
    errors=(
        (errors.GatedRepoError, Reason.SOURCE_AUTH_REQUIRED, f"access is restricted: {_ACCESS}"),
        (
            errors.RepositoryNotFoundError,
            Reason.CHECKPOINT_NOT_FOUND,
            "there is no such repository: check the id; a private one needs HF_TOKEN set on the "
            "server",
        ),
        (
            errors.RevisionNotFoundError,
            Reason.CHECKPOINT_NOT_FOUND,
            "there is no such revision: give a branch, a tag or a commit of the repository",
        ),
        (
            errors.RemoteEntryNotFoundError,
            Reason.CHECKPOINT_NOT_FOUND,
            "a file is not there any more",
        ),
        (errors.HFValidationError, Reason.CHECKPOINT_NOT_FOUND, "this cannot be a repository's id"),
        (
            errors.OfflineModeIsEnabled,
            Reason.SOURCE_UNAVAILABLE,
            "HF_HUB_OFFLINE is set, and the whole checkpoint is not on this machine",
        ),
    ),
    final=(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
    wrappers=(errors.LocalEntryNotFoundError,),
)
