"""What a setting is: a field of a frozen dataclass that knows its bounds and says what it does.

`LLM(...)`, the flags of the command line, configuration files and `docs/parameters.md` are all made of these.
"""

from __future__ import annotations

import functools
import math
import types
from dataclasses import dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from tokenspeed.contracts.errors import ConfigError

_SHOWN = 80
"""Characters of a wrong value in an error."""


@dataclass(frozen=True)
class About:
    """What a field's type does not say. Bounds are those of a number.

    above: `least` itself is too little. env: the environment variable that counts where nothing else is given. alias:
    another name of the flag, not in the help. spread: a flag takes several values after it, else one each time.
    secret: neither shown in errors nor by `repr`.
    """

    help: str
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    env: str = ""
    alias: str = ""
    spread: bool = False
    secret: bool = False

    @property
    def rule(self) -> str:
        """The bounds in words."""
        if self.above:
            return f"above {self.least:g}" + (f" and at most {self.most:g}" if self.most < math.inf else "")
        return f"at least {self.least}" if self.most == math.inf else f"from {self.least} to {self.most}"


def setting(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field; `about` are fields of About."""
    made = About(help, **about)
    return field(default=default, repr=not made.secret, metadata={"about": made})


@dataclass(frozen=True)
class Setting:
    """A field, read. kind: bool, int, float or str; of each value where there may be `several` (a tuple)."""

    name: str
    kind: type
    several: bool
    optional: bool
    default: Any
    about: About

    @property
    def flag(self) -> str:
        """Of the command line."""
        return flag(self.name)

    def problem(self, value: object) -> str:
        """What is wrong with a value, to be put after the setting's name; nothing where it is usable."""
        if value is None and self.optional:
            return ""
        if not self.several:
            return self._problem(value)
        if not isinstance(value, tuple | list):
            return f"must be a list of {self.kind.__name__}, got {self._shown(value)}"
        return next((found for each in value if (found := self._problem(each))), "")

    def _problem(self, value: object) -> str:
        wanted = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, wanted) or isinstance(value, bool) is not (self.kind is bool):
            name = self.kind.__name__ + (" or none" if self.optional else "")
            return f"must be {name}, got {self._shown(value)}"
        about = self.about
        if about.choices and value not in about.choices:
            return f"must be one of {', '.join(about.choices)}, got {self._shown(value)}"
        return self._out_of_bounds(value) if isinstance(value, int | float) else ""

    def _out_of_bounds(self, value: float) -> str:
        about = self.about
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be {about.rule} and finite, got {value}"
        if about.least <= value <= about.most and not (about.above and value == about.least):
            return ""
        return f"must be {about.rule}, got {value}"

    def _shown(self, value: object) -> str:
        kind = type(value).__name__
        if self.about.secret:
            return kind
        if isinstance(value, dict | list | tuple):  # of any depth, and in files with anchors of any size
            return f"a {kind}"
        return f"{value!r:.{_SHOWN}}"


@functools.cache
def settings_of(settings: type) -> tuple[Setting, ...]:
    """The fields of a dataclass that are settings, in order."""
    hints = get_type_hints(settings)
    return tuple(
        Setting(each.name, *_kind(hints[each.name]), each.default, each.metadata["about"])
        for each in fields(settings)
        if "about" in each.metadata
    )


def check(settings: object) -> None:
    """Raise ConfigError for the first value of a settings object that is not usable."""
    kind: Any = type(settings)
    for each in settings_of(kind):
        problem = each.problem(getattr(settings, each.name))
        if problem:
            raise ConfigError(f"{each.flag} {problem}")


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """(type, several, optional) of an annotation: T, T | None or tuple[T, ...]."""
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True, False
    if get_origin(hint) in (Union, types.UnionType):
        (kind,) = (each for each in get_args(hint) if each is not type(None))
        return kind, False, True
    return hint, False, False
