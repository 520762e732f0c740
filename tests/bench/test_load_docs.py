"""docs/load.md: its commands are usable, and it leaves no flag out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tokenspeed.cli.bench_flags import FLAGS, WORKLOADS, settle
from tokenspeed.cli.main import parser

TEXT = (Path(__file__).parents[2] / "docs" / "load.md").read_text()
COMMANDS = re.findall(r"^    tokenspeed (bench serve .*)$", TEXT.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str) -> None:
    kind = settle(parser().parse_args(shlex.split(command)))
    assert kind in command or kind == "single-turn"


def test_flags_and_workloads() -> None:
    assert len(COMMANDS) == 2 + len(WORKLOADS)
    shown = set(re.findall(r"--[a-z][a-z-]+", TEXT))
    assert {f"--{flag.name}" for flag in FLAGS} - shown == set()
    taken = set(parser().parse_args(["bench", "serve"]).__dict__)
    foreign = {"--enable-prompt-tokens-details"}
    assert {flag for flag in shown - foreign if flag[2:].replace("-", "_") not in taken} == set()
