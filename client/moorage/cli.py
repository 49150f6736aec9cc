"""The command line: `moorage serve`, and one command for each thing that a client does."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from moorage import __version__, commands, render
from moorage.client import Client, connect
from moorage.errors import Error
from moorage.requests import SOURCES
from moorage.transport import DEFAULT_ADDRESS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        The exit code: 0, 1 for an error, 2 for wrong usage, 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _serve(argv[1:]) if argv[:1] == ["serve"] else _run(argv)
    except Error as error:
        reason = f"{error.reason}: " if error.reason else ""
        print(f"moorage: {reason}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("moorage: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _serve(argv: list[str]) -> int:
    missing = [name for name in ("moorage_server", "jax") if not importlib.util.find_spec(name)]
    if missing:
        print(
            f'moorage: serve needs {" and ".join(missing)}: pip install "moorage[server]"',
            file=sys.stderr,
        )
        return 2
    before = signal.signal(signal.SIGTERM, _end)  # or the first process of a container has none
    try:
        return int(importlib.import_module("moorage_server.main").main(argv) or 0)
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(*_: object) -> None:
    """Ends a server that has taken nothing yet; an exception might be lost in code that runs."""
    os._exit(0)


def _run(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    with connect(arguments.server) as client:
        output: commands.Output = arguments.run(client, arguments)
    text = render.document(output.data) if arguments.json else output.text
    print(text, flush=True)
    return output.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moorage", description="Keeps language models loaded, and scores token ids exactly."
    )
    parser.add_argument("--version", action="version", version=f"moorage {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    subparsers.add_parser("serve", help="run a server; `moorage serve --help` lists its options")
    for name, command in _COMMANDS.items():
        target = subparsers.add_parser(name, help=command.summary, description=command.summary)
        target.set_defaults(run=command.run)
        for flag, options in (*command.arguments, *_EVERYWHERE):
            target.add_argument(flag, **options)
        if command.either:
            group = target.add_mutually_exclusive_group(required=True)
            for flag, options in command.either:
                group.add_argument(flag, **options)
    return parser


def _ids(text: str) -> Any:
    try:
        return json.loads(sys.stdin.read() if text == "-" else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON, such as [[1,2],[3]]: {error}") from error


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _option(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


Argument: TypeAlias = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Command:
    run: Callable[[Client, Namespace], commands.Output]
    summary: str
    arguments: Sequence[Argument] = ()
    either: Sequence[Argument] = ()


_ID: Argument = ("id", {"help": "a Hugging Face id or a config id"})
_MODEL: Argument = ("model", {"help": "the handle or the id of a loaded model"})
_SOURCE: Argument = (
    "--source",
    {"type": str.lower, "choices": list(SOURCES), "help": "where the checkpoint is kept"},
)
_PATH: Argument = ("--path", {"default": "", "help": "where it is within the source"})
_REVISION: Argument = ("--revision", {"default": "", "help": "a branch, tag, commit or version"})

_EVERYWHERE: Sequence[Argument] = (
    (
        "--server",
        {
            "metavar": "HOST:PORT",
            "help": f"the server; MOORAGE_SERVER or else {DEFAULT_ADDRESS} if left out",
        },
    ),
    ("--json", {"action": "store_true", "help": "print one JSON document"}),
)

_COMMANDS: Mapping[str, _Command] = {
    "resolve": _Command(
        commands.resolve,
        "say what a name means, and with --source whether that source can be loaded from",
        (
            _ID,
            _SOURCE,
            _PATH,
            _REVISION,
            ("--estimate", {"action": "store_true", "help": "also say whether it would fit"}),
        ),
    ),
    "load": _Command(
        commands.load,
        "load a model, or wait for its load",
        (
            _ID,
            (_SOURCE[0], {**_SOURCE[1], "default": "huggingface"}),
            _PATH,
            _REVISION,
            ("--dtype", {"default": "", "help": "of the parameters; as stored if left out"}),
            (
                "--option",
                {
                    "action": "append",
                    "default": [],
                    "type": _option,
                    "metavar": "NAME=VALUE",
                    "help": "what the checkpoint does not tell of itself; may be repeated",
                },
            ),
            ("--compute-dtype", {"default": "", "help": "of the arithmetic; as --dtype"}),
        ),
    ),
    "ps": _Command(
        commands.ps,
        "list the models that are loaded or being loaded",
        (
            (
                "--watch",
                {
                    "action": "store_true",
                    "help": "show them, and what the server does, until interrupted; not on a "
                    "terminal, or with --json, print how they are after each change",
                },
            ),
        ),
    ),
    "forward": _Command(
        commands.forward,
        "score rows: by default, print the log-probability of each token",
        (
            _MODEL,
            ("--tokenizer", {"help": "a tokenizer.json or its folder; else the Hub's"}),
            (
                "--outputs",
                {
                    "type": _names,
                    "default": ["logprobs"],
                    "metavar": "NAME[,NAME]",
                    "help": "what to print, as `moorage status` lists it; logprobs if left out",
                },
            ),
            (
                "--top-k",
                {
                    "type": int,
                    "default": 0,
                    "metavar": "N",
                    "help": "also the N tokens most probable at each position",
                },
            ),
            (
                "--temperature",
                {"type": float, "default": 1.0, "help": "divides the logits; 1 if left out"},
            ),
            (
                "--from-position",
                {
                    "type": int,
                    "default": 0,
                    "metavar": "N",
                    "help": "leave out the first N positions of each row",
                },
            ),
        ),
        either=(
            ("--ids", {"type": _ids, "help": "rows of token ids as JSON; - reads stdin"}),
            ("--text", {"action": "append", "help": "a row as text; may be given repeatedly"}),
        ),
    ),
    "unload": _Command(
        commands.unload,
        "free a model's device memory",
        (_MODEL, ("--force", {"action": "store_true", "help": "even if others lease it"})),
    ),
    "status": _Command(commands.status, "describe the server"),
}
