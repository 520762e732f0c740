"""`tokenspeed sol`: the least time a decode step can take, from the model's shapes alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenspeed.cli.flags import add_floor_flags


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sol",
        help="speed of light: the floor of a decode step",
        description="The floor of one step: bytes over bandwidth, operations over rate. Loads no weights.",
    )
    parser.add_argument(
        "model", nargs="?", help="a shipped config, a directory, a config.json, a .gguf file; by default the demo model"
    )
    add_floor_flags(parser)
    parser.add_argument(
        "--within", type=float, metavar="MS", help="also find the most sequences whose step takes no longer"
    )
    parser.add_argument(
        "--prefill", action="store_true", help="the floor of a prompt of --context tokens, instead of a decode step"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the floor over numbers of sequences: FILE.svg and FILE.png (extra: report)"
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
        options.prefill,
        options.plot is not None,
    )
    if options.plot is not None:
        from tokenspeed.bench.report.floors import draw

        named = Path(options.plot)
        draw(report, named.with_suffix("") if named.suffix in (".svg", ".png") else named)
    if options.json:
        print(json.dumps(report.summary(), indent=2))
        return
    print(report.text())
