"""`tokenspeed sol`: the least time a decode step can take, from the model's shapes alone."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tokenspeed.cli.flags import add_floor_flags


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sol",
        help="speed of light: the floor of a decode step",
        description="The floor of one decode step: bytes over bandwidth, operations over rate. Loads no weights.",
    )
    parser.add_argument(
        "model", nargs="?", help="a shipped config, a directory, a .gguf file; by default the demo model"
    )
    add_floor_flags(parser)
    parser.add_argument(
        "--within", type=float, metavar="MS", help="also find the most sequences whose step takes no longer"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the floor."""
    from tokenspeed.sol.report import step_report

    report = step_report(
        options.model,
        options.gpu,
        options.batch,
        options.context,
        options.quantization,
        options.kv_cache_dtype,
        options.within,
    )
    if options.json:
        print(json.dumps(report.summary(), indent=2))
        return
    print(report.text())
