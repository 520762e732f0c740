"""Configuration files: YAML, a mapping of flag names to values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenspeed.config.settings import Setting
from tokenspeed.contracts.errors import ConfigError

MAX_BYTES = 2**20
_NAME = re.compile(r"\b(alias|anchor|tag|tag handle) ['\"].*", re.DOTALL)
"""In what a YAML parser says, the names that it quotes."""


def read_config_file(path: str, known: Iterable[Setting]) -> dict[str, Any]:
    """Values by the names of `known` settings. Keys are their flags without the dashes in front, with - or _.

    Raises ConfigError, which names file, line and key, for a file that cannot be read, is longer than 1 MiB, no YAML or
    no mapping; for a key that is unknown or there twice; for a value of the wrong type or out of bounds.
    """
    names = {name: each for each in known for name in (each.name, _key(each.about.alias)) if name}
    found: dict[str, Any] = {}
    for where, key, value in _pairs(path, _text(path)):
        each = names.get(_key(key))
        if each is None:
            raise ConfigError(f"{where}: unknown key {key!r:.80}{_hint(key, names)}")
        if each.name in found:
            raise ConfigError(f"{where}: {key} is there twice")
        value = _converted(each, value)
        problem = each.problem(value)
        if problem:
            raise ConfigError(f"{where}: {key} {problem}{_quote(each, value)}")
        found[each.name] = value
    return found


def _text(path: str) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"--config {path}: longer than {MAX_BYTES} bytes")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 text (byte {error.start})") from None


def _pairs(path: str, text: str) -> Iterator[tuple[str, str, Any]]:
    """(file and line, key, value) of the outermost mapping, in order."""
    import yaml  # not on the way of who uses `LLM` in a process of theirs

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            kind = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "text"
            raise ConfigError(f"--config {path}: must be a mapping of flag names to values, is {kind}")
        for key, value in node.value:
            where = f"--config {path}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{where}: a key must be the name of a flag")
            yield where, key.value, loader.construct_object(value, deep=True)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML: {_without_text(error)}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # a day 99, !!int of a word
        raise ConfigError(f"{where}: not YAML: the value is not of its kind") from None
    except RecursionError:
        raise ConfigError(f"--config {path}: nested too deeply") from None


def _key(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _hint(key: str, names: Mapping[str, Setting]) -> str:
    if _key(key).startswith("no_") and _key(key)[3:] in names:
        return f" (write {names[_key(key)[3:]].flag[2:]}: false)"
    close = difflib.get_close_matches(_key(key), names, n=1)
    return f" (is it {names[close[0]].flag[2:]}?)" if close else " (keys are flags without --)"


def _converted(each: Setting, value: object) -> object:
    """One value stands for a list of it; a list becomes a tuple."""
    if not each.several:
        return value
    return tuple(value) if isinstance(value, list) else (value,)


def _quote(each: Setting, value: object) -> str:
    """Whoever writes `api-key: 0123` means text."""
    values = value if isinstance(value, tuple) else (value,)
    is_bare = any(not isinstance(single, str | dict | list | tuple | type(None)) for single in values)
    return ": put it in quotes" if each.kind is str and not each.about.choices and is_bare else ""


def _without_text(error: Exception) -> str:
    """What is wrong and where, without any of the file's own text, which may be a secret."""
    import yaml

    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return "it holds characters that may not be there"
    said = [_NAME.sub(r"\1", text) for text in (error.context, error.problem) if text]
    return f"{', '.join(said)} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
