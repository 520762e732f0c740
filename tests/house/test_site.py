"""The documentation site: it builds without a warning, every page is reached, and what pages quote is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tools import licences_page, recipes_page
from tools.site_hook import on_page_markdown

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def build(site: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert {page for page in pages if not (tmp_path / page / "index.html").exists()} == set()
    text = (tmp_path / "serving" / "index.html").read_text()
    assert text.count("<table>") > 5
    assert "<li><code>echo</code> with" in text


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md)\n")
    config = (ROOT / "mkdocs.yml").read_text().split("nav:\n  - Start")[0].replace("tools/", f"{ROOT}/tools/")
    (tmp_path / "mkdocs.yml").write_text(config)
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode == 1
    assert "gone.md" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "text, made",
    [
        ("a\n- b\n- c\n  d\n\ne\n", "a\n\n- b\n- c\n  d\n\ne\n"),
        ("a:\n1. b\n   - c\n2. d\n", "a:\n\n1. b\n   - c\n2. d\n"),
        ("a\n\n- b\n", "a\n\n- b\n"),
        ("```\na\n- b\n```\nc\n- d\n", "```\na\n- b\n```\nc\n\n- d\n"),
        ("a -\n-b\n", "a -\n-b\n"),
        ("see [a b](../c/d.md#e) and [f](g.md)\n", "see a b (`c/d.md`) and [f](g.md)\n"),
    ],
)
def test_what_the_site_writes_otherwise(text: str, made: str) -> None:
    assert on_page_markdown(text) == made


def test_generated_pages_are_current() -> None:
    assert recipes_page.PAGE.read_text() == recipes_page.page(), "run: python -m tools.recipes_page"
    assert licences_page.PAGE.read_text() == licences_page.page(), "run: python -m tools.licences_page"


def test_a_package_without_a_licence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "metadata", lambda name: _Silent())
    assert licences_page.licence_of("annotated-doc") == "MIT"
    with pytest.raises(LookupError, match="torch states no licence"):
        licences_page.licence_of("torch")


class _Silent:
    def get_all(self, name: str) -> None:
        return None

    def __getitem__(self, name: str) -> None:
        return None


def quoted() -> list[str]:
    """The messages in the first cells of the tables of the page."""
    return re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


def messages(text: str) -> Iterator[str]:
    """What a module raises or warns of, with an ellipsis for each value."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _name(node) in ("warning", "ApiError")):
            for part in ast.walk(node):
                if isinstance(part, ast.JoinedStr):
                    yield "".join(str(each.value) if isinstance(each, ast.Constant) else "…" for each in part.values)
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value.replace("%s", "…")


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def test_messages_of_the_troubleshooting_page_are_raised() -> None:
    raised = [message for path in (ROOT / "tokenspeed").rglob("*.py") for message in messages(path.read_text())]
    raised.append((ROOT / "Makefile").read_text())
    assert len(quoted()) > 35
    assert [text for text in quoted() if not any(text in message for message in raised)] == []


def test_messages_are_found() -> None:
    code = 'def f(a):\n    logger.warning("slow: %s", a)\n    print("no")\n    raise ValueError(f"bad {a}" "!")\n'
    assert {"slow: …", "bad …!"} <= set(messages(code))
    assert "no" not in set(messages(code))
