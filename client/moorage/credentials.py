"""How a client shows who it is, and makes sure of who answers."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from moorage.errors import FailedPrecondition, InvalidRequest
from moorage.transport import OPTIONS


@dataclass(frozen=True)
class Tls:
    """How a connection is secured.

    Attributes:
        ca: A file of the authorities that may sign the server's certificate, PEM; "" for those
            that gRPC brings.
        cert: A file of this client's certificate, PEM, if the server wants one.
        key: A file of its key, PEM.
        server_name: The name in the server's certificate; "" for the host of the address.
    """

    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Returns:
            Credentials of the channel.

        Raises:
            InvalidRequest: `cert` and `key` do not come together.
            FailedPrecondition: A file cannot be read.
        """
        if bool(self.cert) != bool(self.key):
            raise InvalidRequest("a client's certificate and its key belong together: give both")
        ca, key, cert = map(_content, (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


@dataclass(frozen=True)
class Credentials:
    """What a client connects with.

    Attributes:
        tls: How the connection is secured; None for plain text.
        token: What calls carry; "" for none.
        token_file: Where the token is, read at each call; "" for nowhere.
    """

    tls: Tls | None = None
    token: str = field(default="", repr=False)
    token_file: str = ""

    @classmethod
    def of(
        cls,
        address: str,
        tls: Tls | bool | None,
        token: str | None,
        environment: Mapping[str, str] = os.environ,
    ) -> Credentials:
        """Completes what `connect` was given from the environment.

        Args:
            address: The server.
            tls: True for TLS, False for plain text, None for what MOORAGE_TLS and its like say.
            token: None for MOORAGE_TOKEN, or what is in MOORAGE_TOKEN_FILE.
            environment: The environment.

        Returns:
            The credentials.

        Raises:
            InvalidRequest: A token would go over a network in plain text, and `tls` is not False.
        """
        secured = _tls(environment) if tls is None else tls
        if isinstance(secured, bool):
            secured = (_tls(environment) or Tls()) if secured else None
        file = "" if token is not None else environment.get("MOORAGE_TOKEN_FILE", "")
        token = environment.get("MOORAGE_TOKEN", "") if token is None else token
        if (token or file) and secured is None and tls is not False and not _is_local(address):
            raise InvalidRequest(
                f"the token would go to {address} in plain text: connect(tls=True), or "
                "MOORAGE_TLS=1; connect(tls=False) sends it anyway"
            )
        return cls(secured, token, "" if token else file)

    def channel(self, kind: Any, address: str) -> Any:
        """Opens a channel.

        Args:
            kind: `grpc` or `grpc.aio`.
            address: The server.

        Returns:
            A channel of that kind.
        """
        if self.tls is None:
            return kind.insecure_channel(address, options=OPTIONS)
        name = self.tls.server_name
        options = [*OPTIONS, *([("grpc.ssl_target_name_override", name)] if name else [])]
        return kind.secure_channel(address, self.tls.credentials(), options=options)

    def metadata(self) -> list[tuple[str, str]]:
        """What one call carries.

        Returns:
            An id for the server's log, and the token.

        Raises:
            FailedPrecondition: The file of the token cannot be read.
        """
        carried = [("x-request-id", uuid.uuid4().hex[:16])]
        content = _content(self.token_file)
        if token := self.token or (content or b"").decode().strip():
            carried.append(("authorization", f"Bearer {token}"))
        return carried


class Carrying:
    """A stub whose calls carry what its client's credentials say.

    Args:
        stub: The stub.
        credentials: The credentials.
    """

    def __init__(self, stub: Any, credentials: Credentials) -> None:
        self._stub = stub
        self._credentials = credentials

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stub, name)

        def call(request: Any, **options: Any) -> Any:
            return method(request, metadata=self._credentials.metadata(), **options)

        return call


def _tls(environment: Mapping[str, str]) -> Tls | None:
    prefix = "MOORAGE_TLS_"
    names = ("ca", "cert", "key", "server_name")
    given = {name: environment.get(prefix + name.upper(), "") for name in names}
    wanted = environment.get("MOORAGE_TLS", "").lower() in ("1", "true", "yes", "on")
    return Tls(**given) if wanted or any(given.values()) else None


def _is_local(address: str) -> bool:
    host = address.rsplit(":", 1)[0].strip("[]")
    local = host in ("localhost", "::1") or host.startswith("127.")
    return local or address.startswith(("unix:", "unix-abstract:"))


def _content(file: str) -> bytes | None:
    if not file:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise FailedPrecondition(f"{file} cannot be read: {error.strerror}") from error
