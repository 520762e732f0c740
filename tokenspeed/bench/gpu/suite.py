"""Whole decode steps on a GPU through `LLM.generate`: random weights of real shapes, distinct prompts.

A decode row is (T(129 tokens) - T(1 token)) / 128, the median of three; its time to first token is T(1).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tokenspeed.bench.record import Record, Target, surroundings, write
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.sol.floor import GPUS, decode_work

TOKENS = 129
REPEATS = 3
TARGETS_MS = {
    "llama-3.2-1b.bf16": {1: 1.0, 8: 1.3, 32: 1.6, 128: 2.7},
    "llama-3.1-8b.bf16": {1: 4.1, 8: 4.7, 32: 5.7, 128: 9.8},
    "llama-3.1-8b.fp8": {1: 2.7, 32: 4.5, 128: 8.3},
}
TTFT_TARGETS_MS = {"llama-3.2-1b.bf16": 6.5, "llama-3.1-8b.bf16": 24.5, "llama-3.1-8b.fp8": 15.5}
SAMPLED = {"temperature": 0.7, "top_p": 0.95, "top_k": 50}


@dataclass(frozen=True)
class Row:
    """One measured point: `batch` sequences of `context` prompt tokens each; milliseconds."""

    batch: int
    context: int
    decode_ms: float
    first_ms: float
    samples: dict[str, list[float]]


def measure(llm: LLM, batch: int, context: int, sampled: bool, repeats: int = REPEATS) -> Row:
    """Decode and first-token times of one row, after one warming run of each kind."""
    chosen = dict(SAMPLED) if sampled else {"temperature": 0.0}
    _timed(llm, batch, context, TOKENS, chosen)
    long = [_timed(llm, batch, context, TOKENS, chosen) for _ in range(repeats)]
    short = [_timed(llm, batch, context, 1, chosen) for _ in range(repeats)]
    decode = (median(long) - median(short)) / (TOKENS - 1)
    return Row(batch, context, decode, median(short), {"long_ms": long, "short_ms": short})


def _timed(llm: LLM, batch: int, context: int, tokens: int, chosen: dict[str, float]) -> float:
    prompts = _prompts(llm, batch, context)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **chosen)  # type: ignore[arg-type]
    started = time.perf_counter()
    llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    return (time.perf_counter() - started) * 1e3


def _prompts(llm: LLM, batch: int, context: int) -> list[list[int]]:
    return [[random.randrange(1, llm.core.vocab_size) for _ in range(context)] for _ in range(batch)]


def floor_ms(llm: LLM, batch: int, context: int) -> float:
    """Bytes of one step over the read bandwidth of an H200, in milliseconds."""
    program, bytes_ = llm.core.model.program, llm.core.backend.weight_bytes
    work = decode_work(batch, context, bytes_)
    total = sum(program.cost(record, work).bytes for record in program.records)
    return total / (GPUS["H200"].read_gbs * 1e9) * 1e3


def open_llm(model: str, quantization: str | None, batch: int, context: int) -> LLM:
    """A shipped config with random weights, and room for `batch` sequences of `context` and some more tokens."""
    extra: dict[str, Any] = {"quantization": quantization} if quantization else {}
    return LLM(
        model,
        load_format="dummy",
        device="cuda",
        enable_prefix_caching=False,
        max_num_seqs=batch,
        max_num_batched_tokens=8192,
        max_model_len=context + 2 * TOKENS,
        **extra,
    )


@dataclass(frozen=True)
class Group:
    """Rows that share one loaded model."""

    model: str
    quantization: str | None
    batches: tuple[int, ...]
    context: int = 1024


GROUPS = {
    "1b": Group("llama-3.2-1b", None, (1, 8, 32, 128)),
    "8b": Group("llama-3.1-8b", None, (1, 8, 32, 128)),
    "8b-fp8": Group("llama-3.1-8b", "fp8", (1, 32, 128)),
    **{f"1b-ctx{n}": Group("llama-3.2-1b", None, (1,), n) for n in (128, 8192, 32768)},
    **{f"8b-ctx{n}": Group("llama-3.1-8b", None, (1,), n) for n in (128, 8192, 32768)},
}


def run_suite(out: Path, only: Sequence[str] | None = None) -> None:
    """Measure, print and record groups, by default all; each is written as soon as it is done."""
    for name in only or GROUPS:
        group = GROUPS[name]
        llm = open_llm(group.model, group.quantization, max(group.batches), group.context)
        for batch in group.batches:
            for sampled in (False, True) if group.context == 1024 else (False,):
                write(out, _measured(llm, group, batch, sampled))
        llm.close()
        del llm
        torch.cuda.empty_cache()


def _measured(llm: LLM, group: Group, batch: int, sampled: bool) -> list[Record]:
    name = f"{group.model}.{group.quantization or 'bf16'}"
    row = measure(llm, batch, group.context, sampled)
    records = [_record(llm, name, row, sampled)]
    if batch == 1 and not sampled and group.context == 1024:
        records.append(_first(llm, name, row))
    return records


def _record(llm: LLM, name: str, row: Row, sampled: bool) -> Record:
    parts = [f"h200.{name}.decode.b{row.batch}"]
    parts += [f"ctx{row.context}"] if row.context != 1024 else []
    parts += ["sampled"] if sampled else []
    floor = floor_ms(llm, row.batch, row.context + TOKENS // 2)
    target = None if sampled or row.context != 1024 else TARGETS_MS.get(name, {}).get(row.batch)
    print(f"{'.'.join(parts)}: {row.decode_ms:.3f} ms, floor {floor:.3f}, target {target}", flush=True)
    return Record(
        id=".".join(parts),
        value=row.decode_ms,
        unit="ms",
        floor=floor,
        share=floor / row.decode_ms,
        target=Target(at_most=target) if target else None,
        samples=row.samples,
        **surroundings("python -m tokenspeed.bench gpu-suite"),
    )


def _first(llm: LLM, name: str, row: Row) -> Record:
    target = TTFT_TARGETS_MS.get(name)
    print(f"h200.{name}.ttft1024: {row.first_ms:.2f} ms, target {target}", flush=True)
    return Record(
        id=f"h200.{name}.ttft1024",
        value=row.first_ms,
        unit="ms",
        target=Target(at_most=target) if target else None,
        samples={"short_ms": row.samples["short_ms"]},
        **surroundings("python -m tokenspeed.bench gpu-suite"),
    )
