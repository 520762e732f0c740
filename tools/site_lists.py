"""A hook of mkdocs: lists may follow a paragraph without an empty line, as on GitHub."""

from __future__ import annotations

import re
from typing import Any

ITEM = re.compile(r"(?:[-*]|\d+\.) ")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page's text, with an empty line before each list that begins right after a line of text."""
    lines: list[str] = []
    fenced, listed = False, False
    for line in markdown.split("\n"):
        item = ITEM.match(line) is not None
        if line.startswith("```"):
            fenced = not fenced
        elif item and not fenced and not listed and lines and lines[-1].strip():
            lines.append("")
        # Lines that are indented, or that go on with an item's text, belong to it; an empty one ends the list.
        listed = not fenced and bool(line.strip()) and (listed or item)
        lines.append(line)
    return "\n".join(lines)
