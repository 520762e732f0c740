"""A hook of mkdocs, for what works where the repository is looked at and not on the site: lists right after a line of
text, and links to files outside docs."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
ITEM = re.compile(r"(?:[-*]|\d+\.) ")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page's text, with an empty line before each list that begins right after a line of text, and the path in
    the repository in place of a link out of docs."""
    markdown = OUTSIDE.sub(r"\1 (`\2`)", markdown)
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
