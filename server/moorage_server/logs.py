"""What the server logs, and how: as text, or as one JSON object a line."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from moorage_server.calls import CURRENT

_OWN = ("moorage", "moorage_server", "moorage_models")
_MAX_LENGTH = 4000  # of a message that others had a part in
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s%(request)s"


def begin(level: str, form: str) -> None:
    """Sets up the log of the process, on stderr.

    Args:
        level: The least that is logged: "debug", "info", "warning" or "error".
        form: "text" or "json".
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(_TEXT))
    # packages that were imported before may have set it up already
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    handler.addFilter(_is_ours)


def one_line(said: object) -> str:
    """What others had a part in, as the log may have it: short, and what is no text escaped."""
    text = str(said)
    cut = text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]} ... (cut)"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a record is the server's own, or a warning: hubs' clients log signed addresses."""
    return record.name.partition(".")[0] in _OWN or record.levelno >= logging.WARNING


class TextFormatter(logging.Formatter):
    """Lines for people, with the id of the request that they belong to."""

    def format(self, record: logging.LogRecord) -> str:
        """One record, or more than one line if it has a traceback."""
        call = CURRENT.get(None)
        record.request = f" (request {call.request_id})" if call else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One object a line, with the id of the request that it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        call = CURRENT.get(None)
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if call:
            entry |= {"request_id": call.request_id, "method": call.method}
            entry |= {"client": call.caller.name}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)
