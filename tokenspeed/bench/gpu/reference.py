"""The demo model's real weights against reference log-probabilities: ours, and Hugging Face's on the same device.

Teacher-forced: the reference's own greedy tokens are fed, and the log-probabilities of its five best are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tokenspeed.bench.gpu.publish import Publisher
from tokenspeed.bench.gpu.setup import drain, greedy, machine_name
from tokenspeed.bench.gpu.targets import reference_target
from tokenspeed.bench.hf import hf_model
from tokenspeed.bench.stats import median_interval
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.models.registry import shipped_configs
from tokenspeed.weights.loader import load_weights

DATA = Path("tests/data/gemma3-270m-greedy.json")
CONFIG = "gemma-3-270m"
ALTERNATIVES = 20
RATE_TOKENS, RATE_RUNS = 257, 3


@dataclass(frozen=True)
class Item:
    """A prompt, the reference's greedy tokens, and its five best (id, log-probability) at each of them."""

    prompt: list[int]
    greedy: list[int]
    best: list[list[tuple[int, float]]]

    @property
    def fed(self) -> list[int]:
        """All tokens."""
        return self.prompt + self.greedy


def read_items(path: Path) -> list[Item]:
    """The items of a reference file. Raises OSError where it is not there."""
    items = json.loads(path.read_text())["items"]
    return [
        Item(item["prompt_ids"], item["greedy_ids"], [[(int(t), p) for t, p in top] for top in item["top5"]])
        for item in items
    ]


def differences(best: Sequence[tuple[int, float]], ours: Mapping[int, float]) -> list[float]:
    """Absolute differences of log-probabilities at one token. What is missing in `ours` counts as its smallest."""
    least = min(ours.values())
    return [abs(ours.get(token, least) - expected) for token, expected in best]


def our_differences(llm: LLM, items: Sequence[Item]) -> list[float]:
    """Of the engine, by prompt log-probabilities."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=ALTERNATIVES)
    outputs = llm.generate(prompt_token_ids=[item.fed for item in items], sampling_params=params, use_tqdm=False)
    found: list[float] = []
    for item, output in zip(items, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for best, told in zip(item.best, output.prompt_logprobs[len(item.prompt) :], strict=True):
            assert told is not None
            found += differences(best, {token: each.logprob for token, each in told.items()})
    return found


def their_differences(llm: LLM, items: Sequence[Item], device: str) -> list[float]:
    """Of Hugging Face's model in bf16 with the same weights."""
    files = llm.core.files
    assert files.checkpoint is not None
    weights = load_weights(files.checkpoint, files.definition.weights)
    model: Any = hf_model(shipped_configs()[CONFIG], files.definition, weights, torch.bfloat16).to(device)
    found: list[float] = []
    for item in items:
        with torch.inference_mode():
            logits = model(torch.tensor([item.fed], device=device)).logits[0]
        told = logits.float().log_softmax(-1)[len(item.prompt) - 1 : -1].cpu()
        for best, line in zip(item.best, told, strict=True):
            found += differences(best, {token: float(line[token]) for token, _ in best})
    return found


def equal_tokens(llm: LLM, items: Sequence[Item]) -> list[int]:
    """How many greedy tokens of each item the engine's decode steps give before they first differ."""
    prompts, most = [item.prompt for item in items], max(len(item.greedy) for item in items)
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=greedy(most), use_tqdm=False)
    return [_agreeing(item.greedy, output.outputs[0].token_ids) for item, output in zip(items, outputs, strict=True)]


def _agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def rates(llm: LLM, prompt: list[int], tokens: int = RATE_TOKENS) -> list[float]:
    """Tokens per second after the first, one sequence, run by run; the first run warms."""
    found = []
    for _ in range(RATE_RUNS + 1):
        (output,) = llm.generate(prompt_token_ids=[prompt], sampling_params=greedy(tokens), use_tqdm=False)
        found.append(1e3 / output.metrics.timings(tokens)["tpot_ms"])
    return found[1:]


def run_reference(model: Path, device: str, publisher: Publisher, data: Path = DATA, tokens: int = RATE_TOKENS) -> None:
    """Mean differences, ours over Hugging Face's, and tokens per second."""
    items = read_items(data)
    llm = LLM(str(model), device=device, dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False)
    ours = our_differences(llm, items)
    print("greedy tokens that agree:", equal_tokens(llm, items), "of", [len(item.greedy) for item in items])
    found = rates(llm, items[0].prompt, tokens)
    drain(llm)
    theirs = their_differences(llm, items, device)
    llm.close()
    name = f"{machine_name(device)}.{CONFIG}.bf16"
    mean, other = sum(ours) / len(ours), sum(theirs) / len(theirs)
    publisher.add(
        f"{name}.reference",
        mean,
        "nats",
        peer=f"transformers {_transformers_version()} bf16",
        peer_value=other,
        ratio=median_interval([mean / other]),
        target=reference_target(other),
        samples={"ours_max": [max(ours)], "theirs_max": [max(theirs)], "count": [len(ours)]},
    )
    publisher.add(f"{name}.tok_s", median(found), "tok/s", samples={"tok_s": found})


def _transformers_version() -> str:
    import transformers

    return transformers.__version__
