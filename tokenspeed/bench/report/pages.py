"""A report as Markdown and as HTML: parts with a heading, some words, pictures and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#24292f;max-width:72rem;margin:2rem auto;padding:0 1rem}
img{max-width:100%;height:auto;display:block;margin:1rem 0}
div{overflow-x:auto}
table{border-collapse:collapse;font-size:13px}
th,td{border-bottom:1px solid #d8dde3;padding:.25rem .6rem;text-align:left;vertical-align:top}
th{border-bottom-color:#8a8f98}"""


@dataclass(frozen=True)
class Part:
    """pictures: names of SVG files beside the page. A table without rows is left out."""

    title: str
    words: str
    pictures: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=list)


def markdown(title: str, parts: Sequence[Part]) -> str:
    """As Markdown."""
    lines = [f"# {title}", ""]
    for part in parts:
        lines += [f"## {part.title}", part.words, ""]
        lines += [line for name in part.pictures for line in (f"![{part.title}]({name})", "")]
        if part.rows:
            lines += [_row(part.header), "|" + "---|" * len(part.header), *map(_row, part.rows), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def html(title: str, parts: Sequence[Part]) -> str:
    """As a page of its own."""
    body = [f"<h1>{escape(title)}</h1>"]
    for part in parts:
        body += [f"<h2>{escape(part.title)}</h2>", f"<p>{escape(part.words)}</p>"]
        body += [f'<img src="{escape(name)}" alt="{escape(part.title)}">' for name in part.pictures]
        if part.rows:
            head = "".join(f"<th>{escape(cell)}</th>" for cell in part.header)
            body += ["<div><table>", f"<tr>{head}</tr>"]
            body += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in part.rows]
            body.append("</table></div>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return "\n".join(["<!doctype html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>", ""])
