"""docs/models.md is what its tool makes of the registries, and what has no kernel is said."""

from __future__ import annotations

import tests.kernels.triton.interpreter  # noqa: F401, isort: skip
from pathlib import Path

import pytest

from tokenspeed.formats.blocks import BLOCKS
from tokenspeed.kernels.triton import expert_registration
from tokenspeed.models.registry import FAMILIES
from tools import models_page

TEXT = models_page.PAGE.read_text()


def test_the_page_is_current() -> None:
    assert models_page.page() == TEXT, "run: python -m tools.models_page"


def test_every_family_and_format_has_a_row() -> None:
    rows = {line.split("|")[1].strip() for line in TEXT.splitlines() if line.startswith("| ")}
    assert rows >= {family.name for family in FAMILIES} | set(BLOCKS)
    assert not any("| no: " in line for line in TEXT.splitlines())


def test_what_has_no_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_registration, "register", lambda registry: None)
    monkeypatch.setattr(models_page, "_gpu", models_page._gpu.__wrapped__)
    family = next(family for family in FAMILIES if family.name == "mixtral")
    assert "| no: op experts has no implementation on cuda |" in models_page._family(family)


def test_the_readme_tells_of_it() -> None:
    assert "docs/models.md" in (Path(__file__).resolve().parents[2] / "README.md").read_text()
