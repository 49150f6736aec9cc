"""The server's certificates, for gRPC and for HTTP, read again when their files change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from moorage_server.watched_file import WatchedFile


@dataclass(frozen=True)
class TlsFiles:
    """Where the certificates are.

    Attributes:
        cert: The server's, PEM.
        key: The key of the first of them, PEM.
        client_ca: Who signs clients' certificates, PEM; None if they need none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for gRPC, which read the files again at the next handshake after a change.

        Raises:
            ValueError: The files are missing, or do not belong together.
        """
        files = (self.cert, self.key, *([self.client_ca] if self.client_ca else []))
        watched = WatchedFile(self._configuration, *files)

        def latest() -> Any:  # None is "as before", which the stubs do not know
            return watched.value if watched.changed() else None

        return grpc.dynamic_ssl_server_credentials(
            watched.value, latest, require_client_authentication=self.client_ca is not None
        )

    def context(self) -> ssl.SSLContext:
        """A context for HTTP, of the files as they are.

        Raises:
            ValueError: The files are missing, or do not belong together.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.load_into(context)
        if self.client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
        context.options |= ssl.OP_NO_TICKET  # a session is gone on with unverified
        context.num_tickets = 0
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Puts the certificates into a context; connections from then on are made with them.

        Raises:
            ValueError: The files are missing, or do not belong together.
        """
        try:
            context.load_cert_chain(self.cert, self.key)
            if self.client_ca:
                context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"{self.cert}, {self.key}: {error}") from error

    def _configuration(self, files: tuple[bytes, ...]) -> grpc.ServerCertificateConfiguration:
        self.context()  # refuses files that do not belong together, which gRPC does late
        chain, key, *ca = files
        return grpc.ssl_server_certificate_configuration(
            [(key, chain)], root_certificates=ca[0] if ca else None
        )
