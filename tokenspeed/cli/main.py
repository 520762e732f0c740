"""The `tokenspeed` command: picks a subcommand, turns errors of the user's making into one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from tokenspeed import __version__
from tokenspeed.cli import bench, chat, doctor, generate, plan, run_batch, serve, sol, verify
from tokenspeed.contracts.errors import TokenSpeedError

COMMANDS = (generate, chat, serve, run_batch, bench, plan, sol, verify, doctor)


class OneLineParser(argparse.ArgumentParser):
    """Answers wrong usage with one line, and never guesses a flag from its beginning."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"tokenspeed: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = OneLineParser(prog="tokenspeed", description="An LLM inference engine that names its limits.")
    top.add_argument("--version", action="version", version=f"tokenspeed {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 1 for an error or a failed check, 2 for wrong usage, 130 when
    interrupted."""
    options = parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()  # A reader that is gone must show here, not at exit.
        return int(status or 0)
    except TokenSpeedError as error:
        print(f"tokenspeed: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
