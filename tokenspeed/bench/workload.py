"""What `bench serve` asks for: random prompts, or those of a file."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from tokenspeed.contracts.errors import ConfigError

ApiName = Literal["completions", "chat"]
WORDS = (
    "time year people way day man thing woman life child world school state family "
    "student group country problem hand part place case week company system program question work "
    "government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service "
)
"""Common words, about one token each in most vocabularies: the usage that the server reports says what they came to."""
FIRST_ID = 100
"""Ids below are often special ones."""


@dataclass(frozen=True)
class Lengths:
    """Tokens, drawn evenly from low to high."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, flag: str) -> Lengths:
        """From "N" or "LOW:HIGH". Raises ConfigError."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise ConfigError(f"{flag} must be a length or LOW:HIGH, at least 1, got {text!r}")
        return cls(low, high)

    def draw(self, generator: random.Random) -> int:
        """One length."""
        return generator.randint(self.low, self.high)


class DatasetLine(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line of a dataset: prompt (text or ids) or messages, and the most tokens to answer."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Workload:
    """Makes the bodies of requests. `extra`: fields added to each. vocab_size: bound of random ids."""

    api: ApiName
    model: str
    input_len: Lengths
    output_len: Lengths
    seed: int = 0
    vocab_size: int = 8000
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The route below /v1."""
        return "/completions" if self.api == "completions" else "/chat/completions"

    def bodies(self, count: int, dataset: list[DatasetLine] | None = None) -> Iterator[bytes]:
        """`count` bodies; a dataset that is shorter begins again. The same seed makes the same ones."""
        generator = random.Random(self.seed)
        for number in range(count):
            line = dataset[number % len(dataset)] if dataset else self._random(generator)
            tokens = line.max_tokens or self.output_len.draw(generator)
            yield msgspec.json.encode(
                {"model": self.model, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
                | self._asked(line)
                | self.extra
            )

    def _random(self, generator: random.Random) -> DatasetLine:
        length = self.input_len.draw(generator)
        if self.api == "chat":
            return DatasetLine(prompt=" ".join(generator.choices(WORDS.split(), k=length)))
        first = min(FIRST_ID, self.vocab_size // 2)
        return DatasetLine(prompt=generator.choices(range(first, self.vocab_size), k=length))

    def _asked(self, line: DatasetLine) -> dict[str, Any]:
        if self.api == "completions":
            return {"prompt": line.prompt}
        return {"messages": line.messages or [{"role": "user", "content": line.prompt}]}


def read_dataset(path: str, api: ApiName) -> list[DatasetLine]:
    """Lines of JSON. Raises ConfigError naming the line that cannot be used."""
    try:
        raw = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--dataset {path}: {error.strerror}") from None
    lines = []
    for number, text in enumerate(raw, start=1):
        if text.strip():
            try:
                line = msgspec.json.decode(text, type=DatasetLine)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ConfigError(f"--dataset {path}, line {number}: {error}") from None
            _check_line(line, api, f"--dataset {path}, line {number}")
            lines.append(line)
    if not lines:
        raise ConfigError(f"--dataset {path}: no lines")
    return lines


def _check_line(line: DatasetLine, api: ApiName, place: str) -> None:
    if (line.prompt is None) == (line.messages is None):
        raise ConfigError(f"{place}: needs either prompt or messages")
    if api == "completions" and line.prompt is None:
        raise ConfigError(f"{place}: messages need --api chat")
    if api == "chat" and isinstance(line.prompt, list):
        raise ConfigError(f"{place}: token ids need --api completions")
