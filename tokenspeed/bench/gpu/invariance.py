"""`python -m tokenspeed.bench.gpu.invariance`: what batch-invariant mode promises, bit by bit, and what it costs.

Twenty requests, greedy and sampled, run alone, each with an empty prefix cache. Then: among up to 63 others; with other
chunk budgets; after a prefix hit; and without asking for log-probabilities, by captured steps. Token ids and
log-probabilities must be equal to the last bit. Prints one JSON object; status 1 on any difference.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from tokenspeed.bench.gpu.decode import measure
from tokenspeed.bench.record import Record, surroundings, write
from tokenspeed.bench.stats import paired
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.output import RequestOutput
from tokenspeed.quantization.groups import GPU_MODES

BUDGETS = (512, 64, 100, 2048)
"""Most tokens of a step; the first is that of the answers which others are compared with."""
BATCHES = (1, 8, 32)
MOST_ROWS = 64
COST_CONTEXT = 1024
CACHE_BYTES = 12 << 30
COMMAND = "python -m tokenspeed.bench.gpu.invariance"
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


def check(llm: LLM, asked: Sequence[Asked], expected: Sequence[Answer], rng: random.Random) -> dict[str, Any]:
    """Every way with one engine, against the answers alone."""
    silent = [one.silent() for one in asked]
    return {
        "alone": different(expected, iter(enumerate(run_alone(llm, asked)))),
        "mixed": different(expected, run_mixed(llm, asked, MOST_ROWS, rng)),
        "mixed, no log-probabilities": different(expected, run_mixed(llm, silent, MOST_ROWS, rng)),
        "together, no log-probabilities": different(expected, iter(enumerate(run(llm, silent)))),
        "after a prefix hit": different(expected, run_after_hit(llm, asked)),
    }


def measured_costs(on: LLM, off: LLM, name: str, batches: Sequence[int], pairs: int = 3) -> list[Record]:
    """Milliseconds of a decode step with the mode, beside those without, in pairs."""
    records = []
    for batch in batches:

        def decode_ms(llm: LLM, batch: int = batch) -> float:
            return measure(llm, batch, COST_CONTEXT, repeats=1).decode_ms

        result = paired(lambda: decode_ms(on), lambda: decode_ms(off), pairs)
        records.append(
            Record(
                id=f"h200.{name}.invariant.b{batch}",
                value=sorted(result.a)[pairs // 2],
                unit="ms",
                peer="the same without --batch-invariant",
                peer_value=sorted(result.b)[pairs // 2],
                ratio=result.ratio(),
                samples=result.samples(),
                **surroundings(COMMAND),
            )
        )
    return records


def _answer(output: RequestOutput) -> Answer:
    completion = output.outputs[0]
    told = completion.logprobs or []
    logprobs = [[(token, each.logprob, each.rank) for token, each in entry.items()] for entry in told]
    return Answer(list(completion.token_ids), logprobs or None, output.num_cached_tokens)


def _at_times_silent(asked: Asked, rng: random.Random) -> Asked:
    return asked.silent() if rng.random() < 0.5 else asked


def _open(options: argparse.Namespace, **settings: Any) -> LLM:
    extra = {"quantization": options.quantization} if options.quantization else {}
    return LLM(
        options.model, load_format="dummy", device="cuda", max_num_seqs=MOST_ROWS, max_model_len=2048,
        kv_cache_memory_bytes=CACHE_BYTES, **(extra | settings),
    )  # fmt: skip


def _checked(options: argparse.Namespace) -> dict[str, Any]:
    rng, found = random.Random(options.seed), {}
    asked: list[Asked] = []
    expected: list[Answer] = []
    for budget in BUDGETS:
        llm = _open(options, batch_invariant=True, max_num_batched_tokens=budget)
        if not expected:
            asked = make_requests(20, llm.core.vocab_size, 700, 32, rng)
            expected = run_alone(llm, asked)
        found[f"chunks of {budget}"] = check(llm, asked, expected, rng)
        llm.close()
        del llm
        torch.cuda.empty_cache()
    return found


def _costs(options: argparse.Namespace) -> list[Record]:
    plain = {"max_num_batched_tokens": 8192, "enable_prefix_caching": False}
    on, off = _open(options, batch_invariant=True, **plain), _open(options, **plain)
    records = measured_costs(on, off, f"{options.model}.{options.quantization or 'bf16'}", BATCHES)
    on.close()
    off.close()
    return records


def main() -> int:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--model", default="llama-3.2-1b", help="a shipped config")
    parser.add_argument("--quantization", choices=GPU_MODES, default=None)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and mixes (default: 0)")
    parser.add_argument("--no-cost", action="store_true", help="leave out the times")
    parser.add_argument("--out", type=Path, help="merge the records of the times into this file")
    options = parser.parse_args()
    checks = _checked(options)
    records = [] if options.no_cost else _costs(options)
    if options.out and records:
        write(options.out, records)
    ok = not any(way["different"] for ways in checks.values() for way in ways.values())
    ok = ok and all(ways["after a prefix hit"]["cached_tokens"] for ways in checks.values())
    costs = {each.id: {"on_ms": each.value, "off_ms": each.peer_value, "ratio": each.ratio} for each in records}
    report = {"device": torch.cuda.get_device_name(), "ok": ok, "checks": checks, "costs": costs}
    print(json.dumps(msgspec.to_builtins(report), indent=2))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
