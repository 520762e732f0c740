"""What clients do in the soak: every kind of request that a server must take or refuse, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from tokenspeed.bench.workload import WORDS

COMPLETIONS, CHAT = "/completions", "/chat/completions"
STOPS = ["\n", ".", " the"]
SETTINGS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.95}, {"seed": 7, "top_k": 40}]
PREFIXES = 4
"""Long beginnings that many prompts share."""
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Ask:
    """One request. status: the answer's that is right, besides a 429 while too many wait."""

    kind: str
    path: str
    body: bytes
    stream: bool = False
    status: int = 200
    choices: int = 1
    most_tokens: int = 0
    """Of all choices."""
    leave_after: int | None = None
    """The client leaves after so many events, 0 before the first."""


class Traffic:
    """Draws requests for one model. model_len: most tokens of a sequence. tokens_per_word: of its tokenizer."""

    def __init__(self, model: str, model_len: int, tokens_per_word: float, seed: int) -> None:
        self._model, self._model_len, self._per_word = model, model_len, tokens_per_word
        self._random = random.Random(seed)
        self._prefixes = [self._words(model_len // 2) for _ in range(PREFIXES)]
        self._kinds: dict[str, tuple[int, Callable[[], Ask]]] = {
            "completion stream": (5, lambda: self._completion("completion stream", self._short(), _USAGE)),
            "chat stream": (5, lambda: self._chat("chat stream", _USAGE)),
            "completion": (3, lambda: self._completion("completion", self._short(), {})),
            "chat samples": (2, lambda: self._chat("chat samples", {"n": 2, "logprobs": True, "top_logprobs": 2})),
            "samples stream": (2, lambda: self._completion("samples stream", self._short(), _USAGE | {"n": 3})),
            "logprobs": (2, lambda: self._completion("logprobs", self._short(), {"logprobs": 3, "echo": True})),
            "stop": (2, lambda: self._completion("stop", self._short(), {"stop": STOPS} | _USAGE)),
            "prefix": (3, lambda: self._completion("prefix", self._shared(), _USAGE)),
            "long prompt": (1, lambda: self._completion("long prompt", self._words(self._model_len * 3 // 4), _USAGE)),
            "leaves": (3, self._leaver),
            "refused": (2, self._refused),
        }

    def next(self) -> Ask:
        """A request of any kind."""
        weights = [weight for weight, _ in self._kinds.values()]
        ((_, make),) = self._random.choices(list(self._kinds.values()), weights)
        return make()

    def burst(self, count: int) -> list[Ask]:
        """Short requests that come all at once."""
        return [self._completion("burst", self._words(8), _USAGE) for _ in range(count)]

    def reference(self) -> Ask:
        """The same every time, and so is its answer."""
        body = {"model": self._model, "prompt": "The first of all", "max_tokens": 16, "temperature": 0}
        return Ask("reference", COMPLETIONS, msgspec.json.encode(body), most_tokens=16)

    def _words(self, tokens: int) -> str:
        return " ".join(self._random.choices(WORDS.split(), k=max(1, int(tokens / self._per_word))))

    def _short(self) -> str:
        return self._words(self._random.randint(4, max(8, self._model_len // 16)))

    def _shared(self) -> str:
        return f"{self._random.choice(self._prefixes)} {self._short()}"

    def _settings(self) -> dict[str, Any]:
        drawn = {"max_tokens": self._random.randint(1, max(2, self._model_len // 16))}
        return self._random.choice(SETTINGS) | drawn | {"model": self._model}

    def _completion(self, kind: str, prompt: str, fields: dict[str, Any]) -> Ask:
        return _ask(kind, COMPLETIONS, self._settings() | {"prompt": prompt} | fields)

    def _chat(self, kind: str, fields: dict[str, Any]) -> Ask:
        messages = [{"role": "user", "content": self._short()}]
        return _ask(kind, CHAT, self._settings() | {"messages": messages} | fields)

    def _leaver(self) -> Ask:
        fields = self._settings() | _USAGE | {"max_tokens": self._model_len // 4, "ignore_eos": True}
        fields |= {"prompt": self._short(), "n": self._random.choice([1, 2])}
        return _ask("leaves", COMPLETIONS, fields, leave_after=self._random.randint(0, 8))

    def _refused(self) -> Ask:
        sound: dict[str, Any] = {"model": self._model, "prompt": "a"}
        wrong: list[tuple[int, bytes]] = [
            (400, b'{"prompt": '),
            (400, b'{"prompt": "\xff"}'),
            (400, b'{"prompt": ' + b"[" * 10_000),
            (400, msgspec.json.encode(sound | {"no_such_field": 1})),
            (400, msgspec.json.encode(sound | {"temperature": -1})),
            (400, msgspec.json.encode(sound | {"n": 10_000})),
            (400, msgspec.json.encode(sound | {"prompt": self._words(2 * self._model_len)})),
            (404, msgspec.json.encode(sound | {"model": "no-such-model"})),
        ]
        status, body = self._random.choice(wrong)
        return Ask("refused", COMPLETIONS, body, status=status)


def _ask(kind: str, path: str, fields: dict[str, Any], leave_after: int | None = None) -> Ask:
    choices = fields.get("n", 1)
    if choices > 1 and fields.get("temperature") == 0:  # all would be equal, and are refused
        fields = fields | {"temperature": 0.8}
    return Ask(
        kind,
        path,
        msgspec.json.encode(fields),
        stream=fields.get("stream", False),
        choices=choices,
        most_tokens=choices * fields["max_tokens"],
        leave_after=leave_after,
    )
