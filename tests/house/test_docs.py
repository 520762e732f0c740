"""What the documentation shows is what the code is."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_adding_a_model_shows_the_real_file_and_it_is_short() -> None:
    shown = (DOCS / "adding-a-model.md").read_text().split("```python\n")[1].split("```")[0]
    assert shown == (ROOT / "tokenspeed/models/qwen2.py").read_text()
    assert len(shown.splitlines()) < 80


def test_architecture_names_every_room() -> None:
    text = (DOCS / "architecture.md").read_text()
    rooms = [path.parent.name for path in (ROOT / "tokenspeed").glob("*/__init__.py")]
    assert [room for room in rooms if f"`{room}`" not in text] == []
