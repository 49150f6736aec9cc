"""The client for ordinary, blocking code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Unpack

import grpc

from moorage import batch, decode, requests
from moorage.answers import Change, Lease, LoadProgress, Model
from moorage.batch import Batch
from moorage.credentials import Carrying, Credentials, Tls
from moorage.errors import Error, NotFound, translated
from moorage.naming import Resolution, SupportedModel
from moorage.options import ForwardOptions
from moorage.passes import ThreadPasses
from moorage.progress import shown
from moorage.renewal import ThreadRenewal
from moorage.rows import Rows
from moorage.scores import Scores
from moorage.server_info import ParameterLayout, ServerInfo
from moorage.transport import (
    LoadWatch,
    ModelWatch,
    Stubs,
    address_of,
    cancelling,
    closed,
    handle_of,
    seconds_of,
    stubs,
)
from moorage.v1 import moorage_pb2 as pb


def connect(
    address: str | None = None,
    *,
    timeout: float | None = 600.0,
    tls: Tls | bool | None = None,
    token: str | None = None,
) -> Client:
    """Makes a client; nothing is sent until its first call.

    Args:
        address: "host:port" of a server, or "unix:path". By default the environment variable
            MOORAGE_SERVER, or else 127.0.0.1:8470.
        timeout: Seconds that a call may take, or None for any time. A load may take any time.
        tls: `moorage.Tls` for a connection by TLS, True for one with the authorities that gRPC
            brings, False for plain text; None for what the environment says: MOORAGE_TLS=1 is
            True, MOORAGE_TLS_CA, MOORAGE_TLS_CERT, MOORAGE_TLS_KEY and MOORAGE_TLS_SERVER_NAME are
            the attributes of `moorage.Tls`.
        token: Who calls. By default what is in the environment variable MOORAGE_TOKEN, or in the
            file that MOORAGE_TOKEN_FILE names, which is read at each call.

    Returns:
        The client; close it, or use it in a `with` block. Threads may share it.

    Raises:
        InvalidRequest: A token would go over a network in plain text.
    """
    address = address_of(address)
    return Client(address, timeout, Credentials.of(address, tls, token))


class Client:
    """A connection to one server.

    Every method raises `moorage.Error`, and no other exception, when a call fails.

    Args:
        address: "host:port" of the server.
        timeout: Seconds that a call may take, or None for any time.
        credentials: What it connects with; by default nothing, in plain text.
    """

    def __init__(
        self, address: str, timeout: float | None, credentials: Credentials | None = None
    ) -> None:
        self.address = address
        self._timeout = seconds_of(timeout)
        credentials = credentials or Credentials()
        self._channel = credentials.channel(grpc, address)
        self._open: Stubs | None = stubs(self._channel, partial(Carrying, credentials=credentials))
        self._renewal = ThreadRenewal(self._open.models, address)
        self._passes = ThreadPasses(self._open.scoring, address)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what runs, releases all leases and closes the connection. Models stay loaded."""
        self._open = None
        self._passes.stop()
        self._renewal.stop()
        self._channel.close()
        self._passes.join()
        self._renewal.join()

    def resolve(
        self,
        model_id: str,
        source: str | None = None,
        model_path: str | None = None,
        revision: str | None = None,
        *,
        estimate: bool = False,
        check_source: bool | None = None,
    ) -> Resolution:
        """Says what a name means, and whether the server can load it.

        Args:
            model_id: A Hugging Face id, a config id or a model name.
            source: "huggingface", "kaggle", "gcs", "internal" or "maxtext".
            model_path: Where the checkpoint is within the source.
            revision: A branch, tag, commit, version or generation.
            estimate: Also give the bytes that each device would hold.
            check_source: Read the checkpoint's configuration and headers, no weights. None does
                so if `source` is given; otherwise only the name is read.

        Returns:
            What it means.
        """
        model = requests.spec(model_id, source, model_path=model_path, revision=revision)
        request = requests.resolve_name(model, estimate=estimate, check_source=check_source)
        return decode.resolution(self._call(self._stubs.naming.ResolveName, request))

    def supported_models(self) -> list[SupportedModel]:
        """Lists the presets, sorted by config id."""
        request = pb.ListSupportedModelsRequest()
        return decode.supported_models(self._call(self._stubs.naming.ListSupportedModels, request))

    def load(
        self,
        model_id: str,
        source: str = "huggingface",
        model_path: str = "",
        revision: str = "",
        download_path: str = "",
        dtype: str = "",
        compute_dtype: str = "",
        *,
        options: Mapping[str, str] | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
        progress: bool | None = None,
        lease: float | None = None,
        client_name: str = "",
        cancel_if_abandoned: bool = False,
    ) -> Model[Scores]:
        """Loads a model, or joins a load of it, and waits until it is ready.

        Loading what is loaded already returns at once. If the connection breaks, the load goes on
        in the server and the call joins it again; a server that restarts is waited for up to ten
        minutes.

        Args:
            model_id: A Hugging Face id ("google/gemma-2-2b-it") or a config id ("gemma2_2b_it").
            source: "huggingface", "kaggle", "gcs", "internal" or "maxtext".
            model_path: Where the checkpoint is within the source; optional for Hugging Face.
            revision: A branch, tag, commit, version or generation; "" for the source's default.
            download_path: Where the server downloads files to; "" for the source's own cache.
            dtype: The dtype of the parameters in device memory; "" keeps what is stored.
            compute_dtype: The dtype of the arithmetic; "" takes the parameters'.
            options: What a MaxText checkpoint does not tell of itself, by name; a refused load
                says which option is wanted, and its values.
            on_progress: Called with each progress, at least once a second.
            progress: Show a bar on stderr; None does so on a terminal.
            lease: Seconds that a lease on the model lasts: while it does, others can neither evict
                nor unload the model. It is renewed in the background until `release` or `close`;
                if the server was restarted, the model is loaded again. None takes no lease.
            client_name: Who takes the lease, for people to read: a run's name. "" for the user,
                the host and the process.
            cancel_if_abandoned: Cancel the load once everybody has left who waits for it, if all
                of them asked for that.

        Returns:
            The model, ready to serve.
        """
        model = requests.spec(
            model_id,
            source,
            options,
            model_path=model_path,
            revision=revision,
            model_download_path=download_path,
            dtype=dtype,
            compute_dtype=compute_dtype,
        )
        request = requests.load_model(
            model, lease=lease, client_name=client_name, cancel_if_abandoned=cancel_if_abandoned
        )
        with shown(model_id, on_progress, progress) as show:
            response = self._load(request, LoadWatch(show))
        self._passes.answered = True
        self._renewal.hold(request, response)
        return decode.model(response.model, self)

    def models(self) -> list[Model[Scores]]:
        """Lists the models that are loaded or being loaded, oldest first."""
        response = self._call(self._stubs.models.ListModels, pb.ListModelsRequest())
        return [decode.model(model, self) for model in response.models]

    def model(self, handle: str) -> Model[Scores]:
        """Describes one loaded model.

        Args:
            handle: The model's handle.

        Returns:
            The model.

        Raises:
            NotFound: No model with this handle is loaded.
        """
        response = self._call(self._stubs.models.GetModel, pb.GetModelRequest(handle=handle))
        return decode.model(response.model, self)

    def layout(self, model: Model[Any] | str) -> tuple[ParameterLayout, ...]:
        """Tells how a model's parameters lie on the server's mesh.

        Args:
            model: The model, or its handle.

        Returns:
            Every parameter, the largest first.

        Raises:
            NotFound: No model with this handle is loaded.
        """
        request = pb.GetModelRequest(handle=handle_of(model))
        return decode.layout(self._call(self._stubs.models.GetModel, request))

    def watch(self) -> Iterator[Change[Scores]]:
        """Tells what becomes of models, for as long as the caller listens.

        If the connection breaks, the watch goes on where it was; a server that restarts is waited
        for up to ten minutes. It takes any time: leave the loop to end it; `close` cancels it.

        Yields:
            First how all models are; then every change, in order.
        """
        watch = ModelWatch(self)
        while True:
            try:
                call = self._stubs.models.WatchModels(watch.request())
                with translated(self.address), cancelling(call) as responses:
                    for response in responses:
                        if (change := watch.see(response)) is not None:
                            yield change
                raise watch.unfinished()
            except Error as error:
                pause = watch.pause(error)
            time.sleep(pause)

    def lease(self, model: Model[Any] | str) -> Lease | None:
        """Gives the lease that this client holds on a model; asks no server.

        Args:
            model: The model, or its handle.

        Returns:
            The lease; None if there is none, or while it is lost and taken anew.
        """
        return self._renewal.leases.of(handle_of(model))

    def release(self, model: Model[Any] | str) -> None:
        """Ends this client's lease on a model, if it holds one; it is renewed no more in any case.

        Args:
            model: The model, or its handle. It stays loaded until its memory is needed.
        """
        for lease_id in self._renewal.leases.drop(handle_of(model)):
            with suppress(NotFound):  # it has ended already
                request = pb.ReleaseLeaseRequest(lease_id=lease_id)
                self._call(self._stubs.models.ReleaseLease, request)

    def unload(self, model: Model[Any] | str, force: bool = False) -> dict[int, int]:
        """Waits for the model's running forward passes, then frees its device memory.

        This client's own lease ends with that.

        Args:
            model: The model, or its handle.
            force: Unload it even if others lease it.

        Returns:
            Bytes freed, by device id.

        Raises:
            FailedPrecondition: Others lease it.
        """
        handle = handle_of(model)
        with self._renewal.leases.ending(handle) as lease_id:
            request = pb.UnloadModelRequest(handle=handle, lease_id=lease_id, force=force)
            response = self._call(self._stubs.models.UnloadModel, request)
        return decode.device_bytes(response.device_bytes)

    def info(self) -> ServerInfo:
        """Describes the server."""
        request = pb.GetServerInfoRequest()
        return decode.server_info(self._call(self._stubs.server.GetServerInfo, request))

    def forward(
        self,
        model: Model[Any] | str,
        rows: Rows,
        outputs: Iterable[str] = ("logprobs",),
        segment_ids: Rows | None = None,
        **options: Unpack[ForwardOptions],
    ) -> Scores:
        """Runs a forward pass; `Model.forward` says more.

        Args:
            model: The model, or its handle.
            rows: Ragged rows of token ids.
            outputs: Names of outputs, as `ServerInfo.outputs` lists them.
            segment_ids: Shaped as `rows`, or None: each row is one segment.
            **options: See `moorage.ForwardOptions`.

        Returns:
            The scores.
        """
        return self._passes.run(self._batch(model, rows, outputs, segment_ids, options))

    def forward_async(
        self,
        model: Model[Any] | str,
        rows: Rows,
        outputs: Iterable[str] = ("logprobs",),
        segment_ids: Rows | None = None,
        **options: Unpack[ForwardOptions],
    ) -> Future[Scores]:
        """Begins a forward pass; `Model.forward_async` says more.

        Args:
            model: The model, or its handle.
            rows: Ragged rows of token ids.
            outputs: Names of outputs, as `ServerInfo.outputs` lists them.
            segment_ids: Shaped as `rows`, or None: each row is one segment.
            **options: See `moorage.ForwardOptions`.

        Returns:
            A future of the scores; many may be in flight. `close` cancels it.
        """
        return self._passes.start(self._batch(model, rows, outputs, segment_ids, options))

    @property
    def _stubs(self) -> Stubs:
        if self._open is None:
            raise closed(self.address)
        return self._open

    def _batch(
        self,
        model: Model[Any] | str,
        rows: Rows,
        outputs: Iterable[str],
        segment_ids: Rows | None,
        options: ForwardOptions,
    ) -> Batch:
        if self._open is None:
            raise closed(self.address)
        options.setdefault("timeout", self._timeout)
        return batch.make(handle_of(model), rows, outputs, segment_ids, **options)

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        with translated(self.address):
            response = method(request, timeout=self._timeout)
        self._passes.answered = True
        return response

    def _load(self, request: pb.LoadModelRequest, watch: LoadWatch) -> pb.LoadModelResponse:
        while True:
            try:
                call = self._stubs.models.LoadModel(request)
                with translated(self.address), cancelling(call) as responses:
                    for response in responses:
                        if (done := watch.see(response)) is not None:
                            return done
                raise watch.unfinished()
            except Error as error:
                pause = watch.pause(error)
            time.sleep(pause)
