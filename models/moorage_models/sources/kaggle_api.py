"""The calls of Kaggle's API that a load needs, through the client that `kagglehub` uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import kagglehub
import requests
from kagglehub.config import KaggleApiCredentials, get_kaggle_credentials
from kagglehub.exceptions import CredentialError
from kagglehub.handle import ModelHandle
from kagglesdk.kaggle_env import KaggleEnv
from kagglesdk.kaggle_http_client import KaggleHttpClient
from kagglesdk.models.services.model_api_service import ModelApiClient
from kagglesdk.models.types.model_api_service import (
    ApiDownloadModelInstanceVersionRequest,
    ApiGetModelInstanceRequest,
    ApiListModelInstanceVersionFilesRequest,
)

from moorage_models.errors import Reason
from moorage_models.sources.failures import Failures
from moorage_models.sources.record import RemoteFile
from moorage_models.sources.source import within

TIMEOUT = (5.0, 15.0)  # seconds to connect, and between bytes; kagglehub's own

_ENDPOINT_SETTING = "MOORAGE_KAGGLE_ENDPOINT"
_PAGE_FILES = 25
_ACCOUNT = "KAGGLE_USERNAME and KAGGLE_KEY, or KAGGLE_API_TOKEN,"

FAILURES = Failures(
    title="Kaggle",
    cache_setting="KAGGLEHUB_CACHE",
    credential="the Kaggle credential of the server",
    access=(
        "check the path, accept the licence on the model's page at Kaggle, and set "
        f"{_ACCOUNT} on the server to those of an account that may read it"
    ),
    errors=(
        (
            CredentialError,
            Reason.SOURCE_AUTH_REQUIRED,
            f"the server's kaggle.json cannot be read: mend it, or set {_ACCOUNT} instead",
        ),
    ),
)


def latest(handle: ModelHandle) -> int:
    """The latest version of a variation."""
    instance = _ask(ModelApiClient.get_model_instance, ApiGetModelInstanceRequest(), handle)
    return int(instance.version_number)


def listing(handle: ModelHandle) -> dict[str, RemoteFile]:
    """The files of a version; a name that leads out of a folder is not listed."""
    files: dict[str, RemoteFile] = {}
    request: Any = ApiListModelInstanceVersionFilesRequest()
    request.version_number, request.page_size = handle.version, _PAGE_FILES
    while True:
        page = _ask(ModelApiClient.list_model_instance_version_files, request, handle)
        new = {file.name: RemoteFile(int(file.size)) for file in page.files}
        is_last = not page.next_page_token or new.keys() <= files.keys()
        files |= new
        if is_last:
            return {n: file for n, file in files.items() if within(n)}
        request.page_token = page.next_page_token


def address(handle: ModelHandle, name: str) -> str:
    """The signed address of a file in Kaggle's storage, which the API redirects to.

    The client would follow, fetch the whole file, and take a JSON file for an answer of the API.

    Raises:
        OSError: The API does not redirect.
    """
    request: Any = ApiDownloadModelInstanceVersionRequest()
    request.version_number, request.path = handle.version, name
    try:
        _ask(ModelApiClient.download_model_instance_version, request, handle)
    except requests.TooManyRedirects as redirect:
        if redirect.response is not None:
            return str(redirect.response.headers["Location"])
    raise OSError(f"{name} was answered without an address")


def _ask(call: Callable[..., Any], request: Any, handle: ModelHandle) -> Any:
    """Makes one call of Kaggle's API."""
    request.owner_slug, request.model_slug = handle.owner, handle.model
    request.framework, request.instance_slug = handle.framework_enum(), handle.variation
    with _client() as client:
        return call(ModelApiClient(client), request)


def _client() -> Any:
    """A client of Kaggle's API with the credential that kagglehub finds.

    Not the one that kagglehub builds, which waits for ever, and prints that it is out of date.
    """
    try:
        found = get_kaggle_credentials() or KaggleApiCredentials()
        build: Any = KaggleHttpClient
        client = build(
            KaggleEnv.PROD,
            username=found.username,
            password=found.key,
            api_token=found.api_key,
            user_agent=f"kagglehub/{kagglehub.__version__}",
        )
        client._endpoint = os.environ.get(_ENDPOINT_SETTING) or client._endpoint
        client._init_session()
    except (ValueError, OSError) as error:
        raise CredentialError("the credential's file cannot be read") from error
    session = client._session
    session.send = partial(session.send, timeout=TIMEOUT)
    session.max_redirects = 0  # see `address`
    return client
