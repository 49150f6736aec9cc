"""The client for asyncio: the methods of `moorage.Client`, each to be awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias, Unpack

import grpc.aio

from moorage import answers, batch, decode, requests
from moorage.answers import Lease, LoadProgress
from moorage.credentials import Carrying, Credentials, Tls
from moorage.errors import Error, NotFound, translated
from moorage.naming import Resolution, SupportedModel
from moorage.options import ForwardOptions
from moorage.passes import TaskPasses
from moorage.progress import shown
from moorage.renewal import TaskRenewal
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

Model: TypeAlias = answers.Model[Coroutine[Any, Any, Scores]]
"""A model whose `forward` is awaited, or made a task."""

Change: TypeAlias = answers.Change[Coroutine[Any, Any, Scores]]
"""A change of such a model."""


def connect(
    address: str | None = None,
    *,
    timeout: float | None = 600.0,
    tls: Tls | bool | None = None,
    token: str | None = None,
) -> Client:
    """Makes a client; call it within a running event loop.

    Args:
        address: As in `moorage.connect`.
        timeout: As in `moorage.connect`.
        tls: As in `moorage.connect`.
        token: As in `moorage.connect`.

    Returns:
        The client; close it, or use it in an `async with` block.
    """
    address = address_of(address)
    return Client(address, timeout, Credentials.of(address, tls, token))


class Client:
    """A connection to one server; its methods take and give what `moorage.Client`'s do.

    Every method raises `moorage.Error`, and no other exception, when a call fails; a cancelled
    task cancels its call.

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
        self._channel = credentials.channel(grpc.aio, address)
        self._open: Stubs | None = stubs(self._channel, partial(Carrying, credentials=credentials))
        self._renewal = TaskRenewal(self._open.models, address)
        self._passes = TaskPasses(self._open.scoring, address)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what runs, releases all leases and closes the connection. Models stay loaded."""
        self._open = None
        self._passes.stop()
        await self._renewal.stop()
        await self._channel.close(None)

    async def resolve(
        self,
        model_id: str,
        source: str | None = None,
        model_path: str | None = None,
        revision: str | None = None,
        *,
        estimate: bool = False,
        check_source: bool | None = None,
    ) -> Resolution:
        """Says what a name means; see `moorage.Client.resolve`."""
        model = requests.spec(model_id, source, model_path=model_path, revision=revision)
        request = requests.resolve_name(model, estimate=estimate, check_source=check_source)
        return decode.resolution(await self._call(self._stubs.naming.ResolveName, request))

    async def supported_models(self) -> list[SupportedModel]:
        """Lists the presets; see `moorage.Client.supported_models`."""
        request = pb.ListSupportedModelsRequest()
        response = await self._call(self._stubs.naming.ListSupportedModels, request)
        return decode.supported_models(response)

    async def load(
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
    ) -> Model:
        """Loads a model, or joins a load of it; see `moorage.Client.load`."""
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
            response = await self._load(request, LoadWatch(show))
        self._passes.answered = True
        await self._renewal.hold(request, response)
        return decode.model(response.model, self)

    async def models(self) -> list[Model]:
        """Lists the models; see `moorage.Client.models`."""
        response = await self._call(self._stubs.models.ListModels, pb.ListModelsRequest())
        return [decode.model(model, self) for model in response.models]

    async def model(self, handle: str) -> Model:
        """Describes one loaded model; see `moorage.Client.model`."""
        request = pb.GetModelRequest(handle=handle)
        response = await self._call(self._stubs.models.GetModel, request)
        return decode.model(response.model, self)

    async def layout(self, model: answers.Model[Any] | str) -> tuple[ParameterLayout, ...]:
        """Tells how a model lies on the mesh; see `moorage.Client.layout`."""
        request = pb.GetModelRequest(handle=handle_of(model))
        return decode.layout(await self._call(self._stubs.models.GetModel, request))

    async def watch(self) -> AsyncGenerator[Change, None]:
        """Tells what becomes of models, to be iterated; see `moorage.Client.watch`."""
        watch = ModelWatch(self)
        while True:
            try:
                call = self._stubs.models.WatchModels(watch.request())
                with translated(self.address), cancelling(call) as responses:
                    async for response in responses:
                        if (change := watch.see(response)) is not None:
                            yield change
                raise watch.unfinished()
            except Error as error:
                pause = watch.pause(error)
            await asyncio.sleep(pause)

    def lease(self, model: answers.Model[Any] | str) -> Lease | None:
        """Gives the lease that this client holds, at once; see `moorage.Client.lease`."""
        return self._renewal.leases.of(handle_of(model))

    async def release(self, model: answers.Model[Any] | str) -> None:
        """Ends this client's lease on a model; see `moorage.Client.release`."""
        for lease_id in self._renewal.leases.drop(handle_of(model)):
            with suppress(NotFound):  # it has ended already
                request = pb.ReleaseLeaseRequest(lease_id=lease_id)
                await self._call(self._stubs.models.ReleaseLease, request)

    async def unload(self, model: answers.Model[Any] | str, force: bool = False) -> dict[int, int]:
        """Frees a model's device memory; see `moorage.Client.unload`."""
        handle = handle_of(model)
        with self._renewal.leases.ending(handle) as lease_id:
            request = pb.UnloadModelRequest(handle=handle, lease_id=lease_id, force=force)
            response = await self._call(self._stubs.models.UnloadModel, request)
        return decode.device_bytes(response.device_bytes)

    async def info(self) -> ServerInfo:
        """Describes the server; see `moorage.Client.info`."""
        request = pb.GetServerInfoRequest()
        return decode.server_info(await self._call(self._stubs.server.GetServerInfo, request))

    async def forward(
        self,
        model: answers.Model[Any] | str,
        rows: Rows,
        outputs: Iterable[str] = ("logprobs",),
        segment_ids: Rows | None = None,
        **options: Unpack[ForwardOptions],
    ) -> Scores:
        """Runs a forward pass; see `moorage.Client.forward`."""
        if self._open is None:
            raise closed(self.address)
        options.setdefault("timeout", self._timeout)
        asked = batch.make(handle_of(model), rows, outputs, segment_ids, **options)
        return await self._passes.run(asked)

    @property
    def _stubs(self) -> Stubs:
        if self._open is None:
            raise closed(self.address)
        return self._open

    async def _call(self, method: Callable[..., Awaitable[Any]], request: object) -> Any:
        with translated(self.address):
            response = await method(request, timeout=self._timeout)
        self._passes.answered = True
        return response

    async def _load(self, request: pb.LoadModelRequest, watch: LoadWatch) -> pb.LoadModelResponse:
        while True:
            try:
                call = self._stubs.models.LoadModel(request)
                with translated(self.address), cancelling(call) as responses:
                    async for response in responses:
                        if (done := watch.see(response)) is not None:
                            return done
                raise watch.unfinished()
            except Error as error:
                pause = watch.pause(error)
            await asyncio.sleep(pause)
