"""Every preset at its real size, compiled from shapes alone on virtual devices.

    make presets
    python benchmarks/presets.py llama3p1_405b --devices 256 --mesh fsdp=16,tp=16

Parameters, bytes on each device in bfloat16, and for a trunk of one row of 2,048 tokens on each
data-parallel device: compile seconds, and temporaries on a device. These are the CPU compiler's
figures; a TPU's will differ.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", help="config ids; all if none is given")
    parser.add_argument("--mesh", default="fsdp=1,tp=8")
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    sizes = {axis: int(size) for axis, size in (p.split("=") for p in args.mesh.split(","))}
    count = math.prod(sizes.values())
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    os.environ["JAX_PLATFORMS"] = "cpu"

    from moorage_models.families import PRESETS
    from moorage_models.plan import preset_plan
    from moorage_server.engine import Bucket
    from moorage_server.engine.local import make_mesh
    from moorage_server.engine.programs import compile_lowered, lower_trunk

    mesh = make_mesh(sizes)
    bucket = Bucket(args.length, sizes.get("fsdp", 1))
    print(f"mesh {args.mesh}, {bucket.rows} x {bucket.length} tokens, bfloat16, CPU compiler\n")
    print(f"{'preset':32}{'parameters':>16}{'GiB/device':>12}{'temp GiB':>10}{'compile s':>11}")
    for name in args.presets or sorted(PRESETS):
        plan = preset_plan(PRESETS[name])
        begin = time.perf_counter()
        lowered = lower_trunk(plan, "bfloat16", mesh, bucket)
        program = compile_lowered(lowered, mesh, is_trunk=True)
        seconds = time.perf_counter() - begin
        temporary = program.memory_analysis().temp_size_in_bytes
        held = plan.device_bytes(sizes)
        print(
            f"{name:32}{plan.config.num_parameters:>16,}{held / 2**30:>12.2f}"
            f"{temporary / 2**30:>10.2f}{seconds:>11.1f}",
            flush=True,
        )
    print(f"\npeak memory of this process {_peak_bytes() / 2**30:.2f} GiB")


def _peak_bytes() -> int:
    """The process's own peak; getrusage would count what its parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
