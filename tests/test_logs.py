"""The log: text for people and JSON for machines, with the request that a line belongs to."""

import json
import logging
import sys
from contextvars import copy_context

from moorage_server.access import Caller, Role
from moorage_server.calls import CURRENT, Call
from moorage_server.logs import JsonFormatter, TextFormatter, begin, one_line


def record(message: str, *arguments: object, error: bool = False) -> logging.LogRecord:
    info = None
    if error:
        try:
            raise KeyError("boom")
        except KeyError:
            info = sys.exc_info()
    return logging.LogRecord("moorage", logging.WARNING, "x.py", 1, message, arguments, info)


def within_a_call(formatter: logging.Formatter, entry: logging.LogRecord) -> str:
    context = copy_context()
    context.run(CURRENT.set, Call("LoadModel", "abc-1", Caller("grpo-7", Role.LOAD)))
    return context.run(formatter.format, entry)


def test_text_has_the_request():
    formatter = TextFormatter("%(levelname)s %(name)s: %(message)s%(request)s")
    assert formatter.format(record("%d loads", 3)) == "WARNING moorage: 3 loads"
    found = within_a_call(formatter, record("%d loads", 3))
    assert found == "WARNING moorage: 3 loads (request abc-1)"


def test_json_is_one_object_a_line():
    text = within_a_call(JsonFormatter(), record("two\nlines of %s", "text", error=True))
    assert "\n" not in text
    found = json.loads(text)
    assert found.pop("time").endswith("+00:00")
    assert "KeyError: 'boom'" in found.pop("traceback")
    assert found == {
        "level": "warning",
        "logger": "moorage",
        "message": "two\nlines of text",
        "request_id": "abc-1",
        "method": "LoadModel",
        "client": "grpo-7",
    }
    assert "request_id" not in json.loads(JsonFormatter().format(record("x")))


def test_what_others_say_is_one_short_line():
    assert one_line("two\nlines \x1b[2J of \udcff, 日本") == "two\\nlines \\x1b[2J of \\udcff, 日本"
    assert len(one_line("\n" * (4 << 20))) == 8010


def test_the_log_is_the_servers_own(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    begin("info", "text")
    for name in ("httpx", "moorage_server.cache"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "%s at %d", name, level)
    said = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == ["httpx at 30", "moorage_server.cache at 20", "moorage_server.cache at 30"]
