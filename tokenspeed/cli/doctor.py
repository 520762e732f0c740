"""`tokenspeed doctor`: what is installed, what the machine offers, and with --measure what it can do at most."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="check this machine, measure its ceilings",
        description="Versions, processor, memory and GPU as the engine sees them. --measure times reading memory and "
        "matrix products once and caches the result, which `sol`, `plan` and `generate` then use.",
    )
    parser.add_argument("--measure", action="store_true", help="measure the ceilings and cache them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print what was found."""
    found = _look(options.measure)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(f"{name + ':':<20}{value}")


def _look(measure: bool) -> dict[str, Any]:
    import torch

    from tokenspeed.bench.ceilings import measure_cpu
    from tokenspeed.bench.record import versions
    from tokenspeed.observability.ceilings import processor, read_ceilings, usable_threads
    from tokenspeed.observability.memory import free_host_memory

    ceilings = measure_cpu() if measure else read_ceilings()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **versions(),
        "processor": processor(),
        "threads": usable_threads(),
        "vector unit": torch.backends.cpu.get_cpu_capability(),
        "free memory GiB": round(free_host_memory() / 2**30, 1),
        "GPUs": ", ".join(gpus) or "none",
        "read GB/s": round(ceilings.read_gbs, 1) if ceilings else "not measured (--measure)",
        "bf16 TFLOP/s": round(ceilings.bf16_tflops, 3) if ceilings else "not measured (--measure)",
    }
