"""docs/compare.md: its commands are usable, and it leaves no flag out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tokenspeed.bench.compare.workloads import SHAPES
from tokenspeed.cli.bench_compare import _engines, _steps
from tokenspeed.cli.main import parser

TEXT = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
COMMANDS = re.findall(r"^    tokenspeed (bench compare .*)$", TEXT.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str) -> None:
    options = parser().parse_args(shlex.split(command))
    assert len(_engines(options)) == 2
    assert {step.workload for step in _steps(options)} == {options.workload}


def test_flags_and_workloads() -> None:
    assert len(COMMANDS) == 4
    given = ["bench", "compare", "--engine", "a=http://x", "--workload", "agentic"]
    taken = {f"--{name.replace('_', '-')}" for name in vars(parser().parse_args(given))} - {
        "--command",
        "--kind",
        "--run",
    }
    shown = set(re.findall(r"--[a-z][a-z-]+", TEXT))
    assert taken - shown == set()
    foreign = {"--threads", "--parallel", "--ctx-size", "--max-num-seqs"}
    assert shown - taken - foreign == set()
    assert all(f"`{workload}`" in TEXT for workload in SHAPES)
