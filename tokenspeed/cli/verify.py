"""`tokenspeed verify`: the numbers of this machine's kernels, and of a whole model, against plain arithmetic."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenspeed.cli.flags import add_engine_flags, engine_settings


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="check the numbers: kernels, drift, log-probabilities, batch invariance",
        description="Checks every fast kernel that a model uses here against float64, the whole model against plain "
        "ops, its log-probabilities, and batch-invariant mode. Ends with 1 where a bound is broken.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="a .gguf file, a directory, a Hugging Face repository id, or a shipped config (with --load-format dummy); "
        "by default the demo model",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument("--data-seed", type=int, metavar="N", help="of the random rows and prompts, to repeat a run")
    add_engine_flags(parser, leave_out=("model", "batch_invariant"))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check, print the table; 1 where a bound is broken."""
    from tokenspeed.bench.verify.run import run_verify

    settings = engine_settings(options, leave_out=("model", "batch_invariant"))
    return run_verify({"model": options.model} | settings, options.data_seed, options.json)
