"""Tasks that go on when whoever started them has left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from moorage_server.logs import one_line

T = TypeVar("T")

_log = logging.getLogger(__name__)


def start(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a task, and logs its failure, which no caller may be there to see."""
    task = asyncio.create_task(work)
    task.add_done_callback(_note)
    return task


def begin(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a task whose failure is its callers' to see; if all have left, it is nobody's."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return task


def _note(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.warning("%s", one_line(error))
