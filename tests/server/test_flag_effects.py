"""Every flag of `tokenspeed serve` has an effect: a flag without an entry in a table fails."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.seeds import SEED
from tests.server import flag_effects_engine, flag_effects_http
from tests.server.flag_house import House
from tests.tiny_llama import write_tiny
from tokenspeed.cli.main import parser

EFFECTS = flag_effects_http.EFFECTS | flag_effects_engine.EFFECTS
MOST_FLAGS = 60


def serve_parser() -> argparse.ArgumentParser:
    (action,) = (each for each in parser()._actions if isinstance(each, argparse._SubParsersAction))
    made: argparse.ArgumentParser = action.choices["serve"]
    return made


def shown_flags() -> list[str]:
    """The first name of each flag in the help; hidden ones are other names of these."""
    actions = [each for each in serve_parser()._actions if each.option_strings and each.dest != "help"]
    shown = [each for each in actions if each.help != argparse.SUPPRESS]
    assert {each.dest for each in actions} == {each.dest for each in shown}
    return [each.option_strings[0] for each in shown]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    print(f"seed {SEED}")
    return write_tiny(tmp_path_factory.mktemp("tiny"), SEED)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    folder = tmp_path_factory.mktemp("quantised")
    return functools.cache(lambda: flag_effects_engine.make_quantised(folder))


@pytest.fixture
def house(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tiny: Path,
    quantised: Callable[[], Path],
) -> House:
    for name in ("TOKENSPEED_API_KEY", "TOKENSPEED_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    return House(tmp_path, monkeypatch, caplog, tiny, quantised)


def test_every_flag_is_in_a_table() -> None:
    assert len(EFFECTS) == len(flag_effects_http.EFFECTS) + len(flag_effects_engine.EFFECTS)
    assert sorted(EFFECTS) == sorted(shown_flags())


def test_there_are_not_too_many() -> None:
    assert len(shown_flags()) <= MOST_FLAGS


@pytest.mark.parametrize("flag", shown_flags())
def test_effect(flag: str, house: House) -> None:
    EFFECTS[flag](house)
