"""`tokenspeed bench`: measuring the host, a server under load, engines against each other, texts; reports."""

from __future__ import annotations

import argparse
from typing import Any

from tokenspeed.cli import bench_compare, bench_perplexity, bench_report, bench_serve


def add_parser(commands: Any) -> None:
    """Register the subcommand and its own subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure the host overhead, a server under load, engines against each other, or a text; report",
        description="Measure. `bench COMMAND --help` says more.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="COMMAND", help="what to measure, or report")
    host: argparse.ArgumentParser = kinds.add_parser(
        "host",
        help="measure the host's share of a step",
        description="The host's own work per step, with an executor that computes nothing; about a minute.",
    )
    host.add_argument(
        "--output", metavar="FILE", help="file of records to add to (default: benchmarks/results/host.json)"
    )
    host.set_defaults(run=run_host)
    bench_serve.add_parser(kinds)
    bench_compare.add_parser(kinds)
    bench_perplexity.add_parser(kinds)
    bench_report.add_parser(kinds)


def run_host(options: argparse.Namespace) -> None:
    """Measure and record."""
    from tokenspeed.bench import host

    host.main(["--output", options.output] if options.output else [])
