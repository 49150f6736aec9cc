"""What renews a client's leases in the background: a thread for one client, a task for the other.

Both go the same way. While the model of a lost lease is loaded again, which may take minutes, the
other leases are renewed between two messages of that load: the server sends one a second.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from moorage.errors import Error, InternalError, translated
from moorage.leases import Held, Leases
from moorage.transport import cancelling
from moorage.v1 import moorage_pb2 as pb

RENEW_TIMEOUT = 5.0
"""Seconds that a renewal may take before it is tried again."""

RELEASE_TIMEOUT = 1.0
"""Seconds that a release may take where nobody minds: the lease ends anyway."""


class ThreadRenewal:
    """Renews leases in a daemon thread, which starts with the first lease.

    Args:
        models: The stub of the ModelService.
        address: The server, for errors.

    Attributes:
        leases: The leases.
    """

    def __init__(self, models: Any, address: str) -> None:
        self._wake = threading.Event()
        self.leases = Leases(self._wake.set)
        self._models = models
        self._address = address
        self._stopped = False
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def hold(self, request: pb.LoadModelRequest, response: pb.LoadModelResponse) -> None:
        """Renews the lease that came with a model from now on, if one did.

        Args:
            request: What gave it.
            response: The model and the lease.
        """
        if not response.HasField("lease"):
            return
        replaced = self.leases.take(request, response)
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="moorage leases", daemon=True
                )
                self._thread.start()
        self.let_go([replaced])

    def let_go(self, lease_ids: Iterable[str]) -> None:
        """Releases leases, if the server answers; else they end by themselves."""
        with suppress(Error):
            for lease_id in filter(None, lease_ids):
                with translated(self._address):
                    request = pb.ReleaseLeaseRequest(lease_id=lease_id)
                    self._models.ReleaseLease(request, timeout=RELEASE_TIMEOUT)

    def stop(self) -> None:
        """Stops renewing, and releases all leases; `join` follows once the channel is closed."""
        self._stopped = True
        self._wake.set()
        self.let_go(self.leases.drop())

    def join(self) -> None:
        """Waits for the thread, which a closed channel lets end at once."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._wake.wait(self.leases.wait())
                self._wake.clear()
                self._renew()
                for held in self.leases.due(lost=True)[:1]:
                    self._reload(held)
        except ValueError:  # gRPC's word for a call on a closed channel
            if not self._stopped:
                raise

    def _renew(self) -> None:
        for held in self.leases.due(lost=False):
            request = pb.RenewLeaseRequest(lease_id=held.lease.id)
            try:
                with translated(self._address):
                    response = self._models.RenewLease(request, timeout=RENEW_TIMEOUT)
                self.leases.renewed(held, response.lease)
            except Error as error:
                self.leases.failed(held, error)

    def _reload(self, held: Held) -> None:
        try:
            call = self._models.LoadModel(held.request)
            with translated(self._address), cancelling(call) as responses:
                for response in responses:
                    if response.HasField("model"):
                        break
                    self._renew()
                else:
                    raise _unfinished()
            self.let_go([self.leases.reloaded(held, response)])
        except Error as error:
            self.leases.failed(held, error)


class TaskRenewal:
    """Renews leases in a task, which starts with the first lease.

    Args:
        models: The asyncio stub of the ModelService.
        address: The server, for errors.

    Attributes:
        leases: The leases.
    """

    def __init__(self, models: Any, address: str) -> None:
        self._wake = asyncio.Event()
        self.leases = Leases(self._wake.set)
        self._models = models
        self._address = address
        self._task: asyncio.Task[None] | None = None

    async def hold(self, request: pb.LoadModelRequest, response: pb.LoadModelResponse) -> None:
        """Renews the lease that came with a model from now on; see `ThreadRenewal.hold`."""
        if not response.HasField("lease"):
            return
        replaced = self.leases.take(request, response)
        self._task = self._task or asyncio.create_task(self._run(), name="moorage leases")
        await self.let_go([replaced])

    async def let_go(self, lease_ids: Iterable[str]) -> None:
        """Releases leases, if the server answers; else they end by themselves."""
        with suppress(Error):
            for lease_id in filter(None, lease_ids):
                with translated(self._address):
                    request = pb.ReleaseLeaseRequest(lease_id=lease_id)
                    await self._models.ReleaseLease(request, timeout=RELEASE_TIMEOUT)

    async def stop(self) -> None:
        """Stops renewing, and releases all leases."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self.let_go(self.leases.drop())

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.leases.wait()):  # wait_for may lose a cancel
                    await self._wake.wait()
            self._wake.clear()
            await self._renew()
            for held in self.leases.due(lost=True)[:1]:
                await self._reload(held)

    async def _renew(self) -> None:
        for held in self.leases.due(lost=False):
            request = pb.RenewLeaseRequest(lease_id=held.lease.id)
            try:
                with translated(self._address):
                    response = await self._models.RenewLease(request, timeout=RENEW_TIMEOUT)
                self.leases.renewed(held, response.lease)
            except Error as error:
                self.leases.failed(held, error)

    async def _reload(self, held: Held) -> None:
        try:
            call = self._models.LoadModel(held.request)
            with translated(self._address), cancelling(call) as responses:
                async for response in responses:
                    if response.HasField("model"):
                        break
                    await self._renew()
                else:
                    raise _unfinished()
            await self.let_go([self.leases.reloaded(held, response)])
        except Error as error:
            self.leases.failed(held, error)


def _unfinished() -> Error:
    return InternalError("the load ended without a model")
