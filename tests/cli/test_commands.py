"""`plan`, `sol`, `doctor`, and the help texts."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields

import pytest

from tests.cli.conftest import Cli
from tokenspeed import __version__
from tokenspeed.cli.main import COMMANDS, parser
from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.settings import flag
from tokenspeed.observability.ceilings import Ceilings


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen3-8b", None])
def test_plan_adds_up_to_sol(cli: Cli, model: str | None) -> None:
    where = [*([model] if model else []), "--gpu", "h200", "--batch", "3", "--context", "777", "--json"]
    sol, plan = json.loads(cli("sol", *where).out), json.loads(cli("plan", *where).out)
    assert (sol["batch"], sol["context"], sol["machine"]) == (3, 777, "NVIDIA H200")
    assert plan["floor_ms"] == pytest.approx(sol["floor_ms"])
    assert sum(row["floor_us"] for row in plan["rows"]) / 1e3 == pytest.approx(sol["floor_ms"])
    assert sol["tok_s"] == pytest.approx(3e3 / sol["floor_ms"])


def test_the_floor_of_this_machine(cli: Cli, ceilings: Ceilings) -> None:
    found = json.loads(cli("sol", "llama-3.2-1b", "--json").out)
    assert (found["machine"], found["read_gb_s"]) == (ceilings.machine, ceilings.read_gbs)
    fp8 = json.loads(cli("sol", "llama-3.2-1b", "--quantization", "fp8", "--json").out)
    assert fp8["weight_bytes"] < found["weight_bytes"]


def test_a_measured_plan_adds_up_to_the_step(cli: Cli) -> None:
    plan = json.loads(cli("plan", "--measured", "--batch", "2", "--context", "20", "--json").out)
    *records, host = plan["rows"]
    assert [host["op"], sum(row["us"] for row in plan["rows"])] == ["the host's part", pytest.approx(plan["step_us"])]
    assert all(row["us"] > 0 and row["gap_us"] == 0 for row in records)
    assert [sum(row["op"] == op for row in records) for op in ("embed", "attention", "select")] == [1, 18, 1]
    assert sum(row["bytes"] for row in records) == pytest.approx(plan["bytes"], rel=1e-3)
    text = cli("plan", "--measured", "--context", "20").out
    assert "us in all" in text
    assert cli("plan", "--measured", "--context", "0").status == 1


@pytest.mark.parametrize("command", ["sol", "plan"])
def test_tables(cli: Cli, command: str) -> None:
    ran = cli(command, "llama-3.2-1b", "--gpu", "H200")
    assert (ran.status, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("llama-3.2-1b on NVIDIA H200")
    assert {"attention", "linear"} <= {line.split()[0] for line in lines if line}
    assert max(map(len, lines)) < 200


def test_doctor(cli: Cli, ceilings: Ceilings) -> None:
    found = json.loads(cli("doctor", "--json").out)
    assert found["tokenspeed"] == __version__
    assert found["read GB/s"] == ceilings.read_gbs
    assert found["processor"] == ceilings.machine
    text = cli("doctor").out
    for name in found:
        assert f"{name}:" in text


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"tokenspeed {__version__}\n"


def test_every_setting_has_a_flag() -> None:
    known = subparsers()["generate"]._option_string_actions
    # A completion renders no chat template, so the flag would do nothing there.
    for setting in fields(EngineConfig):
        assert (flag(setting.name) in known) == (setting.name != "chat_template")
        if flag(setting.name) in known:
            assert known[flag(setting.name)].default is argparse.SUPPRESS, "what is not given counts for nothing"


def test_every_flag_has_help(cli: Cli) -> None:
    assert len(subparsers()) == len(COMMANDS)
    for name, sub in subparsers().items():
        assert sub.description
        for action in sub._actions:
            assert action.help, (name, action.dest)
            assert not action.help.endswith("."), (name, action.dest)
        shown = cli(name, "--help")
        assert shown.status == 0
        assert shown.out.startswith(f"usage: tokenspeed {name}")
        assert "None" not in shown.out
        assert name in cli("--help").out
