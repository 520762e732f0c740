"""Log-probabilities that the engine tells, of prompts and of tokens it draws, against plain arithmetic."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenspeed.bench.verify.drift import Walked
from tokenspeed.bench.verify.table import Figure, Row
from tokenspeed.contracts.errors import PromptError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.output import RequestOutput

PART = "log-probabilities"
LENGTHS = (33, 18, 5)
DRAWN = 8
TOP = 5
LEAST = 1e-3
"""Nats below which nothing counts as a difference."""
QUANTIZED = {"int8": 0.1, "fp8": 0.25, "int4": 1.0, "mxfp4": 1.0}
"""Mean difference in nats that a quantization of the weights at load may make to the five likeliest tokens."""
RANDOM = 4
"""Times as much with random weights, whose layers nothing has taught to damp it: 8B in fp8 measures 0.57."""
TEXT = (
    "The engine reads every weight of the model once for each step, so the time of a token is the size of the weights "
    "over the speed of the memory. Several requests share a step, and a long prompt is cut into pieces between them."
)


@dataclass(frozen=True)
class Told:
    """tokens: of a sequence. pairs: place of a token in it, a token that may come there, its log-probability. drawn:
    which places are the engine's own."""

    tokens: list[int]
    pairs: list[tuple[int, int, float]]
    drawn: range


def prompts_for(llm: LLM, rng: random.Random, text: bool) -> list[list[int]]:
    """Token ids: of a text where the model has a tokenizer and real weights, else random."""
    longest = llm.core.capacity.max_model_len - DRAWN - 1
    lengths = [max(1, min(length, longest)) for length in LENGTHS]
    if text:
        try:
            ids = llm.get_tokenizer().encode(TEXT)
            if len(ids) >= max(lengths):
                return [ids[:length] for length in lengths]
        except PromptError:
            pass
    return [[rng.randrange(llm.core.vocab_size) for _ in range(length)] for length in lengths]


def ask(llm: LLM, prompts: Sequence[list[int]], told: bool) -> list[Told]:
    """Greedy tokens behind the prompts; told: with log-probabilities of both, which takes other ways of the engine."""
    top = TOP if told else None
    params = SamplingParams(temperature=0.0, max_tokens=DRAWN, ignore_eos=True, logprobs=top, prompt_logprobs=top)
    outputs = llm.generate(prompt_token_ids=list(prompts), sampling_params=params, use_tqdm=False)
    return [_told(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def _told(prompt: list[int], output: RequestOutput) -> Told:
    completion = output.outputs[0]
    entries = [*(output.prompt_logprobs or [None] * len(prompt)), *(completion.logprobs or [])]
    pairs = [
        (at, token, each.logprob) for at, entry in enumerate(entries) if entry for token, each in entry.items() if at
    ]
    tokens = [*prompt, *completion.token_ids]
    return Told(tokens, pairs, range(len(prompt), len(tokens)))


def sequences_of(told: Sequence[Told]) -> list[list[int]]:
    """Each once, in order."""
    return [list(row) for row in dict.fromkeys(tuple(each.tokens) for each in told)]


def told_rows(
    told: Sequence[Told], silent: Sequence[Told], sequences: Sequence[list[int]], exact: Walked, plain: Walked, by: str,
    times: float, routed: bool,
) -> list[Row]:  # fmt: skip
    """Of prompts, of drawn tokens, and of the tokens that steps without log-probabilities draw."""
    first = _offsets(sequences)
    wanted, yardstick = exact.logprobs, plain.logprobs
    rows = []
    for name, drawn in (("of prompts", False), ("of drawn tokens", True)):
        at, tokens, values = _pairs(told, first, drawn, wanted.device)
        if len(at):
            ours, theirs = (values - wanted[at, tokens]).abs(), (yardstick - wanted)[at, tokens].abs()
            bound = times * _mean(theirs, routed) + LEAST
            figure = Figure("median nats" if routed else "mean nats", _mean(ours, routed), bound)
            rows.append(Row(PART, name, by, f"{len(at)} log-probabilities", (figure,)))
    places = [first[tuple(each.tokens)] + at - 1 for each in silent for at in each.drawn]
    chosen = [each.tokens[at] for each in silent for at in each.drawn]
    gaps = wanted[places].amax(-1) - wanted[places, chosen]
    own = yardstick[places].argmax(-1)
    allowed = wanted[places].amax(-1) - wanted[places, own]
    most = times * (float((yardstick - wanted)[places].abs().amax()) + float(allowed.max())) + LEAST
    figure = Figure("nats below the best", float(gaps.median() if routed else gaps.max()), most)
    return [*rows, Row(PART, "greedy tokens, without", by, f"{len(places)} tokens", (figure,))]


def walked_row(name: str, exact: Walked, plain: Walked, fast: Walked, by: str, times: float, routed: bool) -> Row:
    """Of the five likeliest tokens everywhere, by records one by one."""
    top = exact.logprobs.topk(min(TOP, exact.logits.shape[-1])).indices
    wanted = exact.logprobs.gather(-1, top)
    ours, theirs = ((each.logprobs.gather(-1, top) - wanted).abs() for each in (fast, plain))
    figure = Figure(
        "median nats" if routed else "mean nats", _mean(ours, routed), times * _mean(theirs, routed) + LEAST
    )
    return Row(PART, name, by, f"{ours.numel()} log-probabilities", (figure,))


def quantized_row(mode: str, exact: Walked, original: Walked, by: str, drawn: bool) -> Row:
    """What quantising the weights at load changes, in float64: no kernel's doing. drawn: the weights are random."""
    top = original.logprobs.topk(min(TOP, original.logits.shape[-1])).indices
    change = float((exact.logprobs - original.logprobs).gather(-1, top).abs().mean())
    figure = Figure("mean nats", change, QUANTIZED[mode] * (RANDOM if drawn else 1))
    return Row(PART, f"{mode} weights for the original's", by, f"{top.numel()} log-probabilities", (figure,))


def _offsets(sequences: Sequence[list[int]]) -> dict[tuple[int, ...], int]:
    """Where each begins among the rows of a walk."""
    found, start = {}, 0
    for sequence in sequences:
        found[tuple(sequence)] = start
        start += len(sequence)
    return found


def _pairs(
    told: Sequence[Told], first: dict[tuple[int, ...], int], drawn: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = [
        (first[tuple(each.tokens)] + at - 1, token, value)
        for each in told
        for at, token, value in each.pairs
        if (at in each.drawn) == drawn
    ]
    at, tokens, values = zip(*found, strict=True) if found else ((), (), ())
    return (
        torch.tensor(at, dtype=torch.int64, device=device),
        torch.tensor(tokens, dtype=torch.int64, device=device),
        torch.tensor(values, dtype=torch.float64, device=device),
    )


def _mean(values: torch.Tensor, routed: bool) -> float:
    return float(values.median() if routed else values.mean())
