"""The call that is being answered: who makes it, and its id in the log."""

from __future__ import annotations

import itertools
import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from moorage_server.access import Caller, Role

_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_NEW = map("{}{:08x}".format, itertools.repeat(secrets.token_hex(4)), itertools.count(1))


@dataclass
class Call:
    """A call of a method.

    Attributes:
        method: Its name, as `LoadModel`.
        request_id: Its id in the log, which its caller knows too.
        caller: Who makes it; the connection, until its token is known.
    """

    method: str
    request_id: str
    caller: Caller

    @classmethod
    def of(cls, method: str, context: Any) -> Call:
        """A call that comes in, with the id that it brings, or a new one."""
        given = str(dict(context.invocation_metadata() or ()).get("x-request-id", ""))
        request_id = given if _ID.fullmatch(given) else next(_NEW)
        return cls(method.rpartition("/")[2], request_id, Caller(context.peer(), Role.SCORE))


#: The call that the running task answers, or that had it begun.
CURRENT: ContextVar[Call] = ContextVar("call")


def caller() -> Caller:
    """Who makes the call that the running task answers."""
    return CURRENT.get().caller
