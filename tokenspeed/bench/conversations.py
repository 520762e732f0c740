"""Conversations of several turns: each sends all that was said so far, with what the server really answered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokenspeed.bench.measured import Answer, Measured
from tokenspeed.bench.serve import Part, Run, Sender, timed
from tokenspeed.bench.workload import Lengths, Workload, words
from tokenspeed.contracts.errors import ConfigError


class ChatDialogue:
    """Messages. Words are at least about a token each; a template adds some."""

    def __init__(self) -> None:
        self._messages: list[dict[str, str]] = []

    def ask(self, generator: random.Random, length: int) -> dict[str, Any]:
        """The next request, with `length` words more."""
        self._messages.append({"role": "user", "content": " ".join(words(generator, length))})
        return {"messages": self._messages}

    def hear(self, answer: Answer) -> None:
        """Keep what was answered."""
        self._messages.append({"role": "assistant", "content": answer.text})

    def missing(self, grown: int, added: int) -> str | None:
        """What is wrong where the server's count of the prompt has grown so much, and `added` words came."""
        return _too_few_words(grown, added)


class TextDialogue:
    """A text that goes on."""

    def __init__(self) -> None:
        self._text = ""

    def ask(self, generator: random.Random, length: int) -> dict[str, Any]:
        """The next request, with `length` words more."""
        self._text = " ".join([*([self._text] if self._text else []), *words(generator, length)])
        return {"prompt": self._text}

    def hear(self, answer: Answer) -> None:
        """Keep what was answered."""
        self._text += answer.text

    def missing(self, grown: int, added: int) -> str | None:
        """What is wrong where the server's count of the prompt has grown so much, and `added` words came."""
        return _too_few_words(grown, added)


class IdDialogue:
    """Token ids, those of answers as the server gave them (vLLM's extension `return_token_ids`)."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._ids: list[int] = []
        self._answered = 0

    def ask(self, generator: random.Random, length: int) -> dict[str, Any]:
        """The next request, with `length` ids more."""
        self._ids += self._work.ids(generator, length)
        return {"prompt": self._ids, "return_token_ids": True}

    def hear(self, answer: Answer) -> None:
        """Keep what was answered."""
        self._answered = len(answer.token_ids)
        self._ids += answer.token_ids

    def missing(self, grown: int, added: int) -> str | None:
        """What is wrong where the server's count of the prompt has grown so much, and `added` ids came."""
        sent = self._answered + added
        return None if grown == sent else f"prompt_tokens grew by {grown} in a turn that added {sent} ids"


class ScriptDialogue:
    """A conversation whose answers are written beforehand: every server reads the same, whatever it answered itself.

    Token ids for completions, messages of words for chats. An answer is as long as the most that is asked for.
    """

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._ids: list[int] = []
        self._messages: list[dict[str, str]] = []
        self._answered = 0
        self._generator = random.Random()

    def ask(self, generator: random.Random, length: int) -> dict[str, Any]:
        """The next request, with `length` pieces more."""
        self._generator = generator
        return self._add(generator, "user", length)

    def hear(self, answer: Answer) -> None:
        """Go on with the written answer, not with this one."""
        self._answered = self._work.output_len.high
        self._add(self._generator, "assistant", self._answered)

    def missing(self, grown: int, added: int) -> str | None:
        """What is wrong where the server's count of the prompt has grown so much, and `added` pieces came."""
        sent = self._answered + added
        if self._work.api == "chat":
            return _too_few_words(grown, sent)
        return None if grown == sent else f"prompt_tokens grew by {grown} in a turn that added {sent} ids"

    def _add(self, generator: random.Random, role: str, length: int) -> dict[str, Any]:
        if self._work.api == "chat":
            self._messages.append({"role": role, "content": " ".join(words(generator, length))})
            return {"messages": self._messages}
        self._ids += self._work.ids(generator, length)
        return {"prompt": self._ids}


def _too_few_words(grown: int, added: int) -> str | None:
    # What was answered may come to fewer tokens than it was made of, and its last one may merge with a neighbour.
    if 2 * grown >= added:
        return None
    return f"prompt_tokens grew by {grown} in a turn that added {added} words: not all of the conversation was read"


Dialogue = ChatDialogue | TextDialogue | IdDialogue | ScriptDialogue


@dataclass(frozen=True)
class Conversations:
    """`count` conversations, `concurrency` of them under way. work: its input_len is that of a first turn.

    turn_len: what each later turn adds to the conversation. think_s: seconds between an answer and the next turn.
    token_ids: send the ids that the server gave instead of text. scripted: go on with answers written beforehand.
    """

    work: Workload
    count: int
    concurrency: int
    turns: Lengths
    turn_len: Lengths
    think_s: float = 0.0
    token_ids: bool = False
    scripted: bool = False

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"--concurrency must be at least 1, got {self.concurrency}")
        if not 0 <= self.think_s < float("inf"):
            raise ConfigError(f"--think-time must be at least 0, got {self.think_s}")
        if self.token_ids and self.work.api != "completions":
            raise ConfigError("--token-ids needs --api completions")

    def __str__(self) -> str:
        return f"{self.count} conversations, {self.concurrency} at once"

    async def run(self, sender: Sender) -> Run:
        """Hold them all. A conversation ends with a turn that fails."""
        by_turn: list[list[Measured]] = [[] for _ in range(self.turns.high)]
        run = await timed(str(self), self._hold(sender, by_turn))
        parts = [Part.of(f"turn{number}", turn) for number, turn in enumerate(by_turn, start=1) if turn]
        return replace(run, parts=parts)

    async def _hold(self, sender: Sender, by_turn: list[list[Measured]]) -> list[Measured]:
        numbers = iter(range(self.count))
        await asyncio.gather(*(self._one_by_one(sender, numbers, by_turn) for _ in range(self.concurrency)))
        return sorted((request for turn in by_turn for request in turn), key=lambda request: request.sent)

    async def _one_by_one(self, sender: Sender, numbers: Iterator[int], by_turn: list[list[Measured]]) -> None:
        for number in numbers:
            await self._converse(sender, random.Random(f"{self.work.seed}/{number}"), by_turn)

    async def _converse(self, sender: Sender, generator: random.Random, by_turn: list[list[Measured]]) -> None:
        dialogue = self._dialogue()
        before: Measured | None = None
        for turn in by_turn[: self.turns.draw(generator)]:
            added = (self.turn_len if before else self.work.input_len).draw(generator)
            body = self.work.body(dialogue.ask(generator, added), self.work.output_len.draw(generator))
            if before:
                await asyncio.sleep(self.think_s)
            answer = Answer()
            result = Measured(answer=answer)
            turn.append(result)
            await sender.send(sender.request(body), result)
            if result.error is None:
                result.error = self._fault(dialogue, answer, result, before, added)
            if result.error is not None:
                return
            dialogue.hear(answer)
            before = result

    def _dialogue(self) -> Dialogue:
        if self.scripted:
            return ScriptDialogue(self.work)
        if self.work.api == "chat":
            return ChatDialogue()
        return IdDialogue(self.work) if self.token_ids else TextDialogue()

    def _fault(
        self, dialogue: Dialogue, answer: Answer, result: Measured, before: Measured | None, added: int
    ) -> str | None:
        if self.token_ids and not answer.token_ids:
            return "no token_ids in the stream: --token-ids needs a server that knows return_token_ids"
        return dialogue.missing(result.prompt_tokens - before.prompt_tokens, added) if before else None
