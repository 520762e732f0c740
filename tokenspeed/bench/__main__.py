"""`python -m tokenspeed.bench COMMAND`: what runs from an unbuilt source tree, with torch, numpy and msgspec alone."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    suite = commands.add_parser("gpu-suite", help="decode steps and first tokens of the shipped configs on one GPU")
    suite.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="for h200.json")
    suite.add_argument("--only", nargs="+", metavar="NAME", help="some of the groups, by name")
    options = parser.parse_args()

    from tokenspeed.bench.gpu.suite import run_suite

    run_suite(options.out / "h200.json", options.only)


if __name__ == "__main__":
    main()
