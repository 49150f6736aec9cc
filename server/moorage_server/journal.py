"""What is loaded and who leases it, in a small file: the next server goes on from it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moorage_models.sources import ModelRequest, ModelSource
from moorage_server.leases import Lease

_VERSION = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A model that is loaded.

    Attributes:
        handle: Its name in calls.
        request: What was asked for, at the revision that it stood for.
    """

    handle: str
    request: ModelRequest


@dataclass(frozen=True)
class Journal:
    """The file.

    Attributes:
        path: Where it is.
    """

    path: Path

    def write(self, entries: Sequence[Entry], leases: Sequence[Lease], now: float) -> None:
        """Replaces the file.

        It outlives the process, not the machine: it is not forced to the disk, for it is written
        where clients are answered.

        Args:
            entries: The models.
            leases: The leases on them; the time that each has left is what is kept, so that its
                clock stops while no server runs.
            now: The time on the leases' clock.
        """
        kept = [{**asdict(lease), "expires": lease.expires - now} for lease in leases]
        text = json.dumps(
            {"version": _VERSION, "models": [asdict(entry) for entry in entries], "leases": kept}
        )
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            partial.chmod(0o600)  # who knows a lease's id may end it
            os.replace(partial, self.path)
        except OSError as error:
            _log.error("the journal cannot be written: %s", error)

    def read(self, now: float) -> tuple[list[Entry], list[Lease]]:
        """What the last server held; nothing if there is no file, or one that cannot be read.

        Args:
            now: The time on the leases' clock, from which each has left what it had.
        """
        try:
            said = json.loads(self.path.read_text())
            if said["version"] != _VERSION:
                raise ValueError(f"version {said['version']}")
            entries = [Entry(m["handle"], _request(m["request"])) for m in said["models"]]
            leases = [Lease(**{**x, "expires": now + x["expires"]}) for x in said["leases"]]
        except FileNotFoundError:
            return [], []
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.error("the journal %s cannot be read, and is passed over: %s", self.path, error)
            return [], []
        return entries, leases


def _request(said: dict[str, Any]) -> ModelRequest:
    options = tuple((str(name), str(value)) for name, value in said["options"])
    return ModelRequest(**{**said, "source": ModelSource(said["source"]), "options": options})
