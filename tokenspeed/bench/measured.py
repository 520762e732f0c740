"""One request as `bench serve` sees it: its events become times, gaps and the server's own counts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import msgspec


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None

    def __bool__(self) -> bool:
        """Whether there is output in it. A completion's event without text has a token that has none, unless it is the
        end."""
        if self.text is not None:
            return self.text != "" or self.finish_reason is None
        return bool(self.delta)


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Cached | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_event = msgspec.json.Decoder(_Event)
_WORD = re.compile(r"\S\s")


@dataclass
class Answer:
    """What the server answered: the pieces of its text, without reasoning, and its ids where events hold some.

    times: when each piece came, by perf_counter.
    """

    pieces: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)

    def first_word(self) -> float | None:
        """When its first word was whole: something that is not blank, and behind it a blank or the end."""
        text = ""
        for piece, time in zip(self.pieces, self.times, strict=True):
            text += piece
            if _WORD.search(text):
                return time
        return self.times[-1] if text.strip() else None

    def add(self, choice: _Choice, now: float) -> None:
        """Append what an event holds, which came `now`."""
        piece = choice.text if choice.delta is None else choice.delta.content
        if piece:
            self.pieces.append(piece)
            self.times.append(now)
        if choice.token_ids:
            self.token_ids += choice.token_ids


@dataclass
class Measured:
    """One request. Times are perf_counter's; gaps lie between two events with output. Tokens are those of the usage."""

    sent: float = 0.0
    due: float | None = None
    """When it should have been sent; None where nothing but a free place decides that."""
    waited: float = 0.0
    """Seconds that it was held back because as many as may be were under way."""
    first: float | None = None
    last: float = 0.0
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tells_cached: bool = False
    """Whether the server says how many were cached."""
    output_tokens: int = 0
    error: str | None = None
    answer: Answer | None = None
    """Kept where one is given: most loads need no text."""
    _usage_seen: bool = False

    @property
    def late(self) -> float:
        """Seconds between the time it was due and the time it was sent."""
        return 0.0 if self.due is None else self.sent - self.due

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first output; infinite where none came."""
        return float("inf") if self.first is None else self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for a single token."""
        if self.first is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        """Seconds from sending to the last output."""
        return self.last - self.sent

    def arrivals(self) -> list[float]:
        """When each event with output came."""
        return [] if self.first is None else list(accumulate(self.gaps, initial=self.first))

    def on_event(self, now: float, data: bytes) -> None:
        """Take in the data of an event."""
        if data == b"[DONE]":
            return
        try:
            event = _event.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.error = f"not an event of this API: {error}"
            return
        if event.error is not None:
            self.error = f"error event: {event.error}"
        if event.usage is not None:
            self._count(event.usage)
        if self.answer is not None and event.choices:
            self.answer.add(event.choices[0], now)
        if any(event.choices):
            if self.first is None:
                self.first = now
            else:
                self.gaps.append(now - self.last)
            self.last = now

    def end(self) -> None:
        """The response ended as it should; now what it has to hold is checked."""
        if self.error is None and not self._usage_seen:
            self.error = "no usage in the stream: its tokens cannot be counted"
        if self.error is None and self.first is None:
            self.error = "no output"

    def _count(self, usage: _Usage) -> None:
        self._usage_seen = True
        self.prompt_tokens, self.output_tokens = usage.prompt_tokens, usage.completion_tokens
        details = usage.prompt_tokens_details
        if details is not None and details.cached_tokens is not None:
            self.cached_tokens, self.tells_cached = details.cached_tokens, True
