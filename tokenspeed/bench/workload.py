"""What `bench serve` asks for: random prompts, or those of a file."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

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
_WORDS = WORDS.split()
FIRST_ID = 100
"""Ids below are often special ones."""
Line = TypeVar("Line")


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

    def bodies(self, count: int | None, dataset: Sequence[DatasetLine] = ()) -> Iterator[bytes]:
        """`count` bodies, or without end; a dataset that is shorter begins again. The same seed makes the same ones."""
        generator = random.Random(self.seed)
        for number in itertools.count() if count is None else range(count):
            if dataset:
                line = dataset[number % len(dataset)]
                asked, tokens = self.asked_by(line), line.max_tokens
            else:
                asked, tokens = self.asked(self.pieces(generator, self.input_len.draw(generator))), None
            yield self.body(asked, tokens or self.output_len.draw(generator))

    def body(self, asked: dict[str, Any], max_tokens: int) -> bytes:
        """A request for a stream with its usage. asked: `prompt` or `messages`."""
        fixed = {"model": self.model, "max_tokens": max_tokens, "stream": True}
        return msgspec.json.encode(fixed | {"stream_options": {"include_usage": True}} | asked | self.extra)

    def pieces(self, generator: random.Random, length: int) -> list[Any]:
        """Random token ids for completions, words for chats; what is made of them is some `length` tokens long."""
        return self.ids(generator, length) if self.api == "completions" else words(generator, length)

    def ids(self, generator: random.Random, length: int) -> list[int]:
        """Random token ids."""
        return generator.choices(range(min(FIRST_ID, self.vocab_size // 2), self.vocab_size), k=length)

    def asked(self, pieces: list[Any]) -> dict[str, Any]:
        """A prompt of pieces, in the fields of the API."""
        if self.api == "completions":
            return {"prompt": pieces}
        return {"messages": [{"role": "user", "content": " ".join(pieces)}]}

    def asked_by(self, line: DatasetLine) -> dict[str, Any]:
        """What a line of a file asks, in the fields of the API."""
        if self.api == "completions":
            return {"prompt": line.prompt}
        return {"messages": line.messages or [{"role": "user", "content": line.prompt}]}


def words(generator: random.Random, length: int) -> list[str]:
    """Random common words."""
    return generator.choices(_WORDS, k=length)


def read_dataset(path: str, api: ApiName) -> list[DatasetLine]:
    """Lines of JSON. Raises ConfigError naming the line that cannot be used."""
    lines = []
    for place, line in read_lines(path, "--dataset", DatasetLine):
        check_line(line, api, place)
        lines.append(line)
    return lines


def read_lines(path: str, flag: str, kind: type[Line]) -> list[tuple[str, Line]]:
    """The lines of a file of JSON, each with words that name it. Raises ConfigError, also where there is no line."""
    try:
        raw = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None
    decoder, lines = msgspec.json.Decoder(kind), []
    for number, text in enumerate(raw, start=1):
        if text.strip():
            place = f"{flag} {path}, line {number}"
            try:
                lines.append((place, decoder.decode(text)))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ConfigError(f"{place}: {error}") from None
    if not lines:
        raise ConfigError(f"{flag} {path}: no lines")
    return lines


def check_line(line: DatasetLine, api: ApiName, place: str) -> None:
    """Raises ConfigError where a line cannot be asked through an API."""
    if (line.prompt is None) == (line.messages is None):
        raise ConfigError(f"{place}: needs either prompt or messages")
    if api == "completions" and line.prompt is None:
        raise ConfigError(f"{place}: messages need --api chat")
    if api == "chat" and isinstance(line.prompt, list):
        raise ConfigError(f"{place}: token ids need --api completions")
