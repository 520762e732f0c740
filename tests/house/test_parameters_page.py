"""docs/parameters.md is what its tool makes of the definitions, and docs/flag-names.md names flags that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tokenspeed.cli.serve import SECTIONS
from tokenspeed.config.settings import settings_of
from tools import parameters_page

ROOT = Path(__file__).resolve().parents[2]
NAMES = (ROOT / "docs" / "flag-names.md").read_text()
FLAG = re.compile(r"`(--[\w-]+)`")
SETTINGS = [each for settings in SECTIONS.values() for each in settings_of(settings)]


def known_flags() -> set[str]:
    both = {"--no-" + each.flag[2:] for each in SETTINGS if each.kind is bool}
    return {"--config"} | both | {name for each in SETTINGS for name in (each.flag, each.about.alias) if name}


def rows(peer: str) -> list[list[str]]:
    """Cells of the peer's table: its names, ours, the note."""
    text = NAMES.split(f"## {peer}\n")[1].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_is_current() -> None:
    assert parameters_page.PAGE.read_text() == parameters_page.page(), "run: python -m tools.parameters_page"


def test_the_page_has_every_flag_and_variable() -> None:
    text = parameters_page.page()
    assert set(FLAG.findall(text)) >= known_flags()
    code = "\n".join(path.read_text() for path in (ROOT / "tokenspeed").rglob("*.py"))
    variables = set(re.findall(r'"(TOKENSPEED_[A-Z_]+)"', code))
    assert variables >= {"TOKENSPEED_ADMIN_KEY", "TOKENSPEED_CPU_ISA"}
    assert [name for name in variables if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize("peer, least", [("vLLM", 40), ("SGLang", 30)])
def test_names_of_others_lead_to_flags_that_there_are(peer: str, least: int) -> None:
    table = rows(peer)
    assert len(table) >= least
    for theirs, ours, note in table:
        assert theirs.startswith("`")
        assert set(FLAG.findall(ours)) <= known_flags(), ours
        assert ours or note, theirs
    named = [name for theirs, _, _ in table for name in FLAG.findall(theirs)]
    assert len(named) == len(set(named))


def test_a_name_that_is_the_same_is_ours() -> None:
    """Who writes vLLM's name of a flag that we have gets that flag."""
    for theirs, ours, _ in rows("vLLM"):
        for name in FLAG.findall(theirs):
            assert name not in known_flags() or not ours or name in ours or name == "--shutdown-timeout"
            if ours == f"`{name}`":
                assert name in known_flags()
