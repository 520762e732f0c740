"""What all measurements of whole models share: how a model is opened, named, and fed random prompts."""

from __future__ import annotations

import gc
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenspeed.contracts.request import Request
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.models.registry import shipped_configs

STEP_TOKENS = 16384 + 256
"""Tokens fed per step, where a measurement does not say otherwise: sixteen prompts of 1024, and room for the rows that
decode beside them, which would otherwise put off the last of 128 prompts to a step of its own."""
SAMPLED: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "top_k": 50}


@dataclass(frozen=True)
class Setup:
    """A model with random weights on a device. model: a shipped config, or a directory with a config.json. router:
    None for the model's own, or "uniform" (`uniform_router`)."""

    model: str
    quantization: str | None = None
    device: str = "cuda"
    router: str | None = None

    @property
    def name(self) -> str:
        """Like llama-3.1-8b.fp8."""
        stored = shipped_configs().get(self.model, {}).get("quantization_config", {}).get("quant_method", "bf16")
        return f"{Path(self.model).name.lower()}.{self.quantization or stored}"

    def id(self, *parts: str) -> str:
        """A record's id: machine, model, format, then `parts`."""
        return ".".join((machine_name(self.device), self.name, *parts))

    def open(self, sequences: int, length: int, step_tokens: int = STEP_TOKENS) -> LLM:
        """An engine with room for so many sequences of at most `length` tokens. Raises the errors of `LLM`, and
        ConfigError for a router where there is no GPU."""
        llm = LLM(
            self.model,
            load_format="dummy",
            device=self.device,
            quantization=self.quantization,
            enable_prefix_caching=False,
            max_num_seqs=sequences,
            max_num_batched_tokens=step_tokens,
            max_model_len=length,
        )
        if self.router is not None:
            from tokenspeed.bench.gpu.uniform_router import route_uniformly  # Triton is an optional package

            route_uniformly(llm)
        return llm

    def say_experts(self, llm: LLM, batch: int, context: int) -> None:
        """Print how many experts a decode step touches, where the router is not the model's own."""
        if self.router is not None:
            from tokenspeed.bench.gpu.uniform_router import distinct_experts_of

            found = distinct_experts_of(llm, batch, context)
            print(f"{self.name} b{batch}: router {self.router}, {found:.1f} distinct experts per layer", flush=True)


def machine_name(device: str) -> str:
    """First part of an id: cpu, or the card's, like h200."""
    if device == "cpu":
        return "cpu"
    found = re.search(r"[A-Z]+\d+[A-Z]*", torch.cuda.get_device_name())
    return found.group().lower() if found else "gpu"


def greedy(tokens: int) -> SamplingParams:
    """Exactly so many tokens, each the likeliest."""
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def sampled(tokens: int) -> SamplingParams:
    """Exactly so many tokens, drawn with every usual filter."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **SAMPLED)


def random_prompts(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Distinct prompts of random ids."""
    return [[random.randrange(1, llm.core.vocab_size) for _ in range(length)] for _ in range(count)]


def request(llm: LLM, name: str, length: int, tokens: int) -> Request:
    """A request for the step loop itself: a random prompt, completed greedily."""
    (prompt,) = random_prompts(llm, 1, length)
    return Request(request_id=name, prompt_token_ids=prompt, params=greedy(tokens), seed=0)


def drain(llm: LLM) -> None:
    """Step until nothing is under way."""
    while llm.core.has_work:
        llm.core.step()


def free_memory(device: str) -> None:
    """Give back what a closed engine held; captured steps refer to their executor and it to them."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
