"""Which flags of `bench serve` go together."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from tokenspeed.cli.bench_flags import ALL, FLAGS, MIXED, MULTI, Flag, settle
from tokenspeed.cli.main import parser
from tokenspeed.contracts.errors import ConfigError

VALUES: dict[Any, str] = {int: "3", float: "2.5", str: "4"}
NEEDED = {MULTI: ("--concurrency", "1"), MIXED: ("--concurrency", "1", "--rate", "1")}
PAIRS = [(flag, kind) for flag in FLAGS for kind in ALL]


def parsed(kind: str, *arguments: str) -> argparse.Namespace:
    work = [kind, "file"] if kind.startswith("--") else ["--workload", kind]
    return parser().parse_args(["bench", "serve", *work, *NEEDED.get(kind, ()), *arguments])


def name(value: Flag | str) -> str:
    return value.name if isinstance(value, Flag) else value


@pytest.mark.parametrize("flag, kind", PAIRS, ids=name)
def test_a_flag_goes_with_its_kinds_alone(flag: Flag, kind: str) -> None:
    rate = ("--rate", "1") if flag.name == "burstiness" else ()
    options = parsed(kind, *rate, f"--{flag.name}", VALUES[flag.type])
    if kind in flag.kinds:
        assert settle(options) == kind
        assert vars(options)[flag.field] == flag.type(VALUES[flag.type])
    else:
        with pytest.raises(ConfigError, match=r"^(--[\w-]+ does not go with|give one of --dataset and --trace)"):
            settle(options)


@pytest.mark.parametrize("kind", ALL)
def test_defaults_are_those_of_the_kind(kind: str) -> None:
    options = parsed(kind)
    given = {field for field, value in vars(options).items() if value is not None}
    assert settle(options) == kind
    for flag in FLAGS:
        if flag.field not in given:
            assert vars(options)[flag.field] == (flag.default if kind in flag.kinds else None)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("--groups", "3"), "--groups does not go with --workload single-turn"),
        (("--workload", "shared-prefix", "--input-len", "3"), "--input-len does not go with --workload shared-prefix"),
        (("--dataset", "f", "--input-len", "3"), "--input-len does not go with --dataset"),
        (("--trace", "f", "--rate", "3"), "--rate does not go with --trace"),
        (("--trace", "f", "--dataset", "g"), "give one of --dataset and --trace"),
        (("--trace", "f", "--workload", "multi-turn"), "--trace does not go with --workload multi-turn"),
        (("--workload", "multi-turn"), "--workload multi-turn needs --concurrency"),
        (("--workload", "interference", "--rate", "1"), "--workload interference needs --concurrency and --rate"),
        (("--concurrency", "1", "--burstiness", "1"), "--burstiness needs --rate"),
        (("--token-ids",), "--token-ids does not go with --workload single-turn"),
        (("--concurrency", "0"), "--concurrency must be at least 1, got 0"),
        (("--trace", "f", "--block-size", "0"), "--block-size must be at least 1, got 0"),
    ],
)
def test_combinations_are_refused_by_name(arguments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settle(parser().parse_args(["bench", "serve", *arguments]))
    assert str(raised.value) == complaint


def test_limits_do_not_go_with_requests_of_two_kinds() -> None:
    with pytest.raises(ConfigError, match="--goodput does not go with --workload interference"):
        settle(parsed(MIXED, "--goodput", "ttft:5"))
