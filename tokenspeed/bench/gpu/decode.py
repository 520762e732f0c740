"""Decode and first-token times through `LLM.generate`: (T(n tokens) - T(1 token)) / (n - 1), each a median."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from tokenspeed.bench.gpu.setup import greedy, random_prompts, sampled
from tokenspeed.engine.llm import LLM

TOKENS = 129
REPEATS = 3


@dataclass(frozen=True)
class Point:
    """One measured point: `batch` sequences of `context` prompt tokens each, `tokens` drawn; milliseconds."""

    batch: int
    context: int
    tokens: int
    long_ms: list[float]
    short_ms: list[float]

    @property
    def decode_ms(self) -> float:
        """Per token of every sequence, after the first."""
        return (median(self.long_ms) - median(self.short_ms)) / (self.tokens - 1)

    @property
    def first_ms(self) -> float:
        """Until every sequence has its first token."""
        return median(self.short_ms)

    @property
    def mean_context(self) -> int:
        """What a sequence holds in the middle of the decode steps."""
        return self.context + self.tokens // 2

    @property
    def samples(self) -> dict[str, list[float]]:
        """As `Record.samples` keeps them."""
        return {"long_ms": self.long_ms, "short_ms": self.short_ms}


def measure(
    llm: LLM, batch: int, context: int, tokens: int = TOKENS, *, draws: bool = False, repeats: int = REPEATS
) -> Point:
    """After warming runs: the first steps of a kind run eagerly and are captured then. draws: T 0.7, top-p, top-k,
    whose graphs are those of greedy steps."""
    for count in (3,) if draws else (3, tokens):
        timed_ms(llm, batch, context, count, draws)
    pairs = [[timed_ms(llm, batch, context, count, draws) for count in (tokens, 1)] for _ in range(repeats)]
    long, short = zip(*pairs, strict=True)
    return Point(batch, context, tokens, list(long), list(short))


def timed_ms(llm: LLM, batch: int, context: int, tokens: int, draws: bool) -> float:
    """Wall time of fresh prompts until all have their tokens."""
    prompts, params = random_prompts(llm, batch, context), sampled(tokens) if draws else greedy(tokens)
    started = time.perf_counter()
    llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    return (time.perf_counter() - started) * 1e3
