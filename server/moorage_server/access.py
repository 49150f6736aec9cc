"""Who calls, and what they may do."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from moorage_server.errors import Reason, ServerError
from moorage_server.watched_file import WatchedFile

_MIN_LENGTH = 16  # of a token: shorter ones can be guessed
_SCHEME = "bearer "

_log = logging.getLogger(__name__)


class Role(IntEnum):
    """What a caller may do; each role may do what those before it may."""

    SCORE = 1
    LOAD = 2
    ADMIN = 3


#: The role that a method wants, by the beginning of its name; the longest that fits counts.
METHODS: Mapping[str, Role] = {
    "/": Role.ADMIN,
    "/grpc.health.v1.Health/": Role.SCORE,
    "/grpc.reflection.": Role.SCORE,
    "/moorage.v1.NamingService/": Role.SCORE,
    "/moorage.v1.ScoringService/": Role.SCORE,
    "/moorage.v1.ServerService/": Role.SCORE,
    "/moorage.v1.ModelService/": Role.LOAD,
    "/moorage.v1.ModelService/GetModel": Role.SCORE,
    "/moorage.v1.ModelService/ListModels": Role.SCORE,
    "/moorage.v1.ModelService/WatchModels": Role.SCORE,
}


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        name: The name of the token, or the connection.
        role: What it may do.
    """

    name: str
    role: Role

    def check(self, role: Role, what: str) -> None:
        """Refuses what the caller may not do.

        Args:
            role: The role that it takes.
            what: What is asked for, for the message.

        Raises:
            ServerError: PERMISSION_DENIED.
        """
        if self.role < role:
            raise ServerError(
                Reason.PERMISSION_DENIED,
                f"{what} takes a token of role {role.name.lower()}; that of {self.name!r} is of "
                f"role {self.role.name.lower()}",
            )


class Access:
    """Tells callers by their tokens; without a file of tokens, everybody may do everything."""

    def __init__(self, tokens: Path | None = None) -> None:
        """Reads the tokens.

        Args:
            tokens: A file with a name, a role and a token on each line; it is read again when it
                changes, and as it was if it is wrong then.

        Raises:
            ValueError: The file is wrong.
        """
        self._tokens = WatchedFile(parse_tokens, tokens) if tokens else None

    def caller(self, authorization: str, connection: str) -> Caller:
        """Who calls.

        Args:
            authorization: What the call carries: `Bearer` and a token, or nothing.
            connection: Where it comes from.

        Raises:
            ServerError: UNAUTHENTICATED.
        """
        if self._tokens is None:
            return Caller(connection, Role.ADMIN)
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise ServerError(
                Reason.UNAUTHENTICATED,
                "this server wants a token: connect(token=...), or MOORAGE_TOKEN",
            )
        found = self._tokens.value.get(_digest(authorization[len(_SCHEME) :].strip()))
        if found is None:
            raise ServerError(Reason.UNAUTHENTICATED, "this server does not know that token")
        return found

    def caller_of(self, context: Any) -> Caller:
        """Who makes a gRPC call; see `caller`."""
        return self.caller_with(context.invocation_metadata(), context.peer())

    def caller_with(self, metadata: Any, connection: str = "") -> Caller:
        """Who makes a gRPC call with such metadata; see `caller`."""
        return self.caller(str(dict(metadata or ()).get("authorization", "")), connection)


@cache
def role_for(method: str) -> Role:
    """The role that a method wants."""
    return METHODS[max(filter(method.startswith, METHODS), key=len)]


def parse_tokens(files: tuple[bytes, ...]) -> Mapping[bytes, Caller]:
    """Callers by the digest of their token, so that no time tells how much of one was right.

    Args:
        files: What is in the file.

    Raises:
        ValueError: What is wrong, by the line; no token is named.
    """
    found: dict[bytes, Caller] = {}
    for number, line in enumerate(files[0].decode().splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) != 3 or words[1].upper() not in Role.__members__:
            raise ValueError(
                f"line {number}: wanted a name, a role (score, load or admin) and a token"
            )
        name, role, token = words
        if len(token) < _MIN_LENGTH:
            raise ValueError(f"line {number}: a token has at least {_MIN_LENGTH} characters")
        if _digest(token) in found:
            raise ValueError(f"line {number}: this token stands in an earlier line, too")
        found[_digest(token)] = Caller(name, Role[role.upper()])
    if not found:
        raise ValueError("there is no token in it")
    return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
