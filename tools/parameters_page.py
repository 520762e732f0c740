"""Writes docs/parameters.md from the definitions of the settings: `python -m tools.parameters_page`."""

from __future__ import annotations

from pathlib import Path

from tokenspeed.cli.serve import SECTIONS
from tokenspeed.config.settings import Setting, settings_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parameters.md"
HEAD = """\
# Parameters

Made by `python -m tools.parameters_page` from `tokenspeed/config/`: change the definitions, not this page.
[flag-names.md](flag-names.md) has vLLM's and SGLang's names beside these.

A value comes from the command line, else from the file of `--config`, else from the environment, else it is the
default. What is not known, of the wrong type or out of bounds is refused with the name and the limit.

## `--config FILE`
A YAML mapping of flags without their dashes in front, with `-` or `_` within; for `serve` all flags of this page, for
`generate` and `chat` those under "engine":

```yaml
model: org/name
served-model-name: [large, default]   # a list where several values may be given; one stands for a list of it
max_num_seqs: 32
enable-prefix-caching: false          # flags that are on or off take true and false
cors-origin: "*"
```

`MODEL` and all flags on the command line come before the file, lists as a whole. A key that is unknown or there twice,
a file that is no mapping, cannot be read or is longer than 1 MiB is an error that names file and line. Text that looks
like a number needs quotes.
"""
ENVIRONMENT = {
    "HF_HOME": "where the Hugging Face hub's client keeps repositories, and the token that `hf auth login` wrote",
    "HF_TOKEN": "the token for repositories that need one",
    "HF_HUB_OFFLINE": "1: take repositories from the cache alone",
    "OPENAI_API_KEY": "the key that `tokenspeed bench serve` brings where `--api-key` is not given",
    "OTEL_*": "OpenTelemetry's own, for `--otlp-traces-endpoint`",
    "TOKENSPEED_CPU_ISA": "the instruction set of the CPU kernels, for tests: avx512, avx2, neon or generic",
    "XDG_CACHE_HOME": "the demo model, measured ceilings and compiled kernels: in `tokenspeed/` below it (`~/.cache`)",
}
"""Variables that belong to no flag."""


def page() -> str:
    """The whole text."""
    parts = [HEAD]
    for title, settings in SECTIONS.items():
        parts.append(_section(title, settings_of(settings)))
    parts.append(_environment())
    return "\n".join(parts)


def _section(title: str, settings: tuple[Setting, ...]) -> str:
    note = "Keywords of `LLM`, with `_`, and flags of `generate` and `chat`, too.\n\n" if title == "engine" else ""
    rows = [
        f"| {_flags(each)} | {_type(each)} | {_default(each.default)} | {_cell(each.about.help)} |" for each in settings
    ]
    return "\n".join([f"## {title.capitalize()}\n{note}| flag | type | default | |", "|---|---|---|---|", *rows, ""])


def _flags(each: Setting) -> str:
    names = [each.flag]
    if each.kind is bool:
        names.append("--no-" + each.flag[2:])
    if each.about.alias:
        names.append(each.about.alias)
    return " ".join(f"`{name}`" for name in names)


def _type(each: Setting) -> str:
    about = each.about
    if about.choices:
        return " ".join(f"`{choice}`" for choice in about.choices)
    if each.kind in (int, float):
        return f"{each.kind.__name__}, {about.rule}" if about.least > float("-inf") else each.kind.__name__
    return {bool: "on or off", str: "text"}[each.kind] + (", several" if each.several else "")


def _default(value: object) -> str:
    if value is None or value == () or value == "":
        return ""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"`{value}`"


def _environment() -> str:
    known = dict(ENVIRONMENT)
    for settings in SECTIONS.values():
        for each in settings_of(settings):
            if each.about.env:
                known[each.about.env] = f"`{each.flag}`"
    rows = [f"| `{name}` | {_cell(known[name])} |" for name in sorted(known)]
    return "\n".join(["## Environment", "| variable | |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
