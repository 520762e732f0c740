"""What batch-invariant mode promises, bit by bit: a request's tokens and log-probabilities do not depend on what runs
beside it, on how its prompt is cut, and on what of it was cached."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tokenspeed.bench.verify.table import Figure, Row
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.output import RequestOutput

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.95, "top_k": 50},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
)


@dataclass(frozen=True)
class Asked:
    """A request."""

    prompt: list[int]
    params: SamplingParams

    def silent(self) -> Asked:
        """The same without log-probabilities."""
        return Asked(self.prompt, msgspec.structs.replace(self.params, logprobs=None))


@dataclass(frozen=True)
class Answer:
    """Token ids; per token (id, log-probability, rank) of it and of its alternatives, None where not asked for; and
    how many prompt tokens came from the cache."""

    token_ids: list[int]
    logprobs: list[list[tuple[int, float, int]]] | None
    num_cached: int

    def same(self, other: Answer) -> bool:
        """Whether all bits that both have are equal."""
        told = self.logprobs is None or other.logprobs is None or self.logprobs == other.logprobs
        return self.token_ids == other.token_ids and told


def make_requests(count: int, vocab_size: int, longest: int, tokens: int, rng: random.Random) -> list[Asked]:
    """Random prompts of 1 to `longest` tokens, seeds of their own, and kinds of sampling in turn."""
    return [
        Asked(
            [rng.randrange(1, vocab_size) for _ in range(rng.randint(1, longest))],
            SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=1, seed=number, **KINDS[number % len(KINDS)]),
        )
        for number in range(count)
    ]


def run(llm: LLM, asked: Sequence[Asked]) -> list[Answer]:
    """Together, as a step's budget takes them."""
    outputs = llm.generate(
        prompt_token_ids=[one.prompt for one in asked], sampling_params=[one.params for one in asked], use_tqdm=False
    )
    return [_answer(output) for output in outputs]


def run_alone(llm: LLM, asked: Sequence[Asked]) -> list[Answer]:
    """One after another, each with an empty prefix cache."""
    answers = []
    for one in asked:
        llm.core.cache.reset()
        answers += run(llm, [one])
    return answers


def run_mixed(llm: LLM, asked: Sequence[Asked], most: int, rng: random.Random) -> Iterator[tuple[int, Answer]]:
    """In mixes of 2 to `most` requests of which some are others, until each has been in one; with their numbers."""
    left = list(range(len(asked)))
    rng.shuffle(left)
    longest, tokens = max(len(one.prompt) for one in asked), asked[0].params.max_tokens or 1
    while left:
        size = rng.randint(2, most)
        mine, left = left[: max(1, size // 2)], left[max(1, size // 2) :]
        others = make_requests(size - len(mine), llm.core.vocab_size, longest, tokens, rng)
        order = [*((number, asked[number]) for number in mine), *((-1, _at_times_silent(one, rng)) for one in others)]
        rng.shuffle(order)
        llm.core.cache.reset()
        answers = run(llm, [one for _, one in order])
        yield from ((number, answer) for (number, _), answer in zip(order, answers, strict=True) if number >= 0)


def run_after_hit(llm: LLM, asked: Sequence[Asked]) -> Iterator[tuple[int, Answer]]:
    """Each again, right after another request that begins with most of its prompt; with their numbers."""
    for number, one in enumerate(asked):
        llm.core.cache.reset()
        run(llm, [Asked(one.prompt[: max(1, len(one.prompt) * 3 // 4)], one.params)])
        yield number, run(llm, [one])[0]


def different(expected: Sequence[Answer], found: Iterator[tuple[int, Answer]]) -> dict[str, Any]:
    """How many were compared, which differ, and how many prompt tokens came from the cache."""
    numbered = list(found)
    wrong = sorted({number for number, answer in numbered if not answer.same(expected[number])})
    cached = sum(answer.num_cached for _, answer in numbered)
    return {"compared": len(numbered), "different": wrong, "cached_tokens": cached}


def _answer(output: RequestOutput) -> Answer:
    completion = output.outputs[0]
    told = completion.logprobs or []
    logprobs = [[(token, each.logprob, each.rank) for token, each in entry.items()] for entry in told]
    return Answer(list(completion.token_ids), logprobs or None, output.num_cached_tokens)


def _at_times_silent(asked: Asked, rng: random.Random) -> Asked:
    return asked.silent() if rng.random() < 0.5 else asked


def check(
    llm: LLM, asked: Sequence[Asked], expected: Sequence[Answer], most: int, rng: random.Random
) -> dict[str, dict[str, Any]]:
    """Every way with one engine, in mixes of up to `most` requests, against the answers alone."""
    silent = [one.silent() for one in asked]
    return {
        "alone": different(expected, iter(enumerate(run_alone(llm, asked)))),
        "mixed": different(expected, run_mixed(llm, asked, most, rng)),
        "mixed, no log-probabilities": different(expected, run_mixed(llm, silent, most, rng)),
        "together, no log-probabilities": different(expected, iter(enumerate(run(llm, silent)))),
        "after a prefix hit": different(expected, run_after_hit(llm, asked)),
    }


def invariance_rows(ways: dict[str, dict[str, Any]], budget: int, by: str) -> list[Row]:
    """A row per way, of an engine that feeds up to `budget` tokens a step: how many answers differ."""
    return [
        Row(
            "batch invariance",
            f"{way}, steps of {budget} tokens",
            by,
            f"{found['compared']} requests, {found['cached_tokens']} tokens from the cache",
            (Figure("different", len(found["different"]), 0),),
        )
        for way, found in ways.items()
    ]
