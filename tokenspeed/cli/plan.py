"""`tokenspeed plan`: the program of a decode step, row by row, with what runs it and its floor."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from tokenspeed.cli.flags import add_floor_flags

if TYPE_CHECKING:
    from tokenspeed.bench.measured_plan import MeasuredPlan
    from tokenspeed.sol.plan_table import PlanTable


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="print the program of a decode step",
        description="Every record of a model's decode step: op, shapes, implementation, bytes, FLOPs, floor.",
    )
    parser.add_argument(
        "model", nargs="?", help="a shipped config, a directory, a .gguf file; by default the demo model"
    )
    add_floor_flags(parser)
    parser.add_argument(
        "--measured", action="store_true", help="run the model and tell what each record takes (on a GPU where one is)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the plan."""
    step = (options.model, options.gpu, options.batch, options.context, options.quantization, options.kv_cache_dtype)
    table = _measured(*step) if options.measured else _planned(*step)
    print(json.dumps(table.as_json(), indent=2) if options.json else table.text())


def _planned(*step: Any) -> PlanTable:
    from tokenspeed.sol.plan_table import plan_table

    return plan_table(*step)


def _measured(*step: Any) -> MeasuredPlan:
    from tokenspeed.bench.measured_plan import measured_plan

    return measured_plan(*step)
