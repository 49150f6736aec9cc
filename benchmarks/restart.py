"""What of a compile a restarted server finds in its cache: a ratio of one run.

    python benchmarks/restart.py

Pairs of server processes, one after the other, load SmolLM2-135M-Instruct with all default buckets
and outputs: the first with an empty folder for compiled programs, the second with what it left
there. The figure is the seconds of the stage `compile`, warm over cold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import load_limits
import turns

for folder in ("examples", "tests"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))

import moorage
import real_models
from moorage import LoadProgress
from moorage_server.settings import SETTINGS
from server_process import server_process

TARGET = "<= 0.20"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=real_models.RECIPES, default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = real_models.make(args.model)
    cold, warm = zip(*(restart(model) for _ in range(args.rounds)), strict=True)
    print(turns.HEADER)
    turns.show("seconds of the stage compile, cold", cold)
    turns.show("seconds of the stage compile, warm", warm)
    turns.show("restart: compile, warm / cold", turns.ratios(warm, cold), TARGET)


def restart(model: Path) -> tuple[float, float]:
    """How long the stage takes without programs to be found, and with them."""
    with tempfile.TemporaryDirectory() as scratch:
        return compile_seconds(model, Path(scratch)), compile_seconds(model, Path(scratch))


def compile_seconds(model: Path, scratch: Path) -> float:
    """How long the stage takes, by its own rate, as the last progress before the end has it."""
    seconds: list[float] = []

    def see(progress: LoadProgress) -> None:
        stage = progress.stages.get("compile")
        if stage and stage.rate:
            seconds.append(stage.total / stage.rate)

    with (
        server_process(
            model.parent,
            scratch,
            mesh="fsdp=1,tp=1",
            buckets=str(SETTINGS["buckets"].default),
            outputs="",
        ) as server,
        moorage.connect(server.address) as client,
    ):
        load_limits.back_memory(model)
        client.load(model.name, "internal", str(model), on_progress=see, progress=False)
    return seconds[-1]


if __name__ == "__main__":
    main()
