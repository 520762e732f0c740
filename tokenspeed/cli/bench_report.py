"""`tokenspeed bench report`: tables and pictures of result files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenspeed.contracts.errors import ConfigError

RESULTS = Path("benchmarks/results")


def add_parser(kinds: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "report",
        help="tables and pictures of result files",
        description="Write report.md, report.html and pictures (SVG and PNG). Needs matplotlib, of the extra `report`.",
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="records, or what `bench serve --json` and `plan --measured --json` print (default: benchmarks/results/)",
    )
    parser.add_argument("--out", default="report", metavar="DIR", help="folder to write into (default: %(default)s)")
    parser.add_argument(
        "--history", nargs="+", default=[], metavar="ID", help="ids, or patterns of them, whose history is drawn"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write it, and say what was written."""
    from tokenspeed.bench.report.write import write_report

    files = list(map(Path, options.files)) or sorted(RESULTS.glob("*.json"))
    if not files:
        raise ConfigError(f"no FILE given, and no results in {RESULTS}/")
    for path in write_report(files, Path(options.out), options.history):
        print(path)
