"""Rates through `LLM.generate` against llama.cpp's own programs, row by row.

A decode rate of ours counts the tokens after the first of every sequence, from the last first token to the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from tokenspeed.bench import llama_cpp
from tokenspeed.bench.ceilings import measure_read_gbs
from tokenspeed.bench.llama_cpp import LlamaCpp
from tokenspeed.bench.record import Record, Target, surroundings
from tokenspeed.bench.stats import PairedResult, median_interval, paired
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.output import RequestMetrics
from tokenspeed.engine.timings import decode_bytes

COMMAND = "make bench-cpu"
SETTINGS: dict[str, Any] = {"enable_prefix_caching": False, "max_model_len": 4096}
"""Of our engine in every row."""
Head = Literal["full", "screened"]
PLAIN_BUS_SHARE = 0.78
SAMPLED: dict[str, Any] = {"temperature": 0.8}
SAMPLED_TOP: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "top_k": 40}
VOCABULARY = range(1000, 200000)
"""Ids of random prompts."""


@dataclass(frozen=True)
class Row:
    """One figure: tokens per second of ours and of llama.cpp with the same threads, and the ratio to reach.

    context: of decoding rows, the mean number of tokens before the one that is made.
    """

    name: str
    head: Head
    threads: int
    target: float | None
    ours: Callable[[LLM], float]
    theirs: Callable[[LlamaCpp], float]
    context: int | None = None
    program: str = "llama-bench"

    @property
    def id(self) -> str:
        """Of its record."""
        return f"cpu.{self.name}.t{self.threads}" + (".screened" if self.head == "screened" else "")


def rows(threads: int) -> list[Row]:
    """Every row for a number of threads. Prefill and batches are recorded with the plain head only."""
    found = [row for head in ("full", "screened") for row in _decode_rows(threads, head)]
    return [*found, _prefill_row(threads), _batch_row(threads)]


def _decode_rows(threads: int, head: Head) -> list[Row]:
    plain = head == "full"
    deep = (1.6 if plain else 1.9) if threads == 1 else (1.5 if plain else 1.7)
    return [
        Row(
            "decode128",
            head,
            threads,
            1.6 if plain else 2.0,
            lambda llm: decode_rate(llm, 129),
            lambda peer: peer.decode(threads),
            context=80,
        ),
        _sampled_row("decode128.sampled", head, threads, 1.4 if plain else 1.7, SAMPLED, llama_cpp.TEMPERATURE),
        _sampled_row("decode128.sampled_top", head, threads, 1.4 if plain else None, SAMPLED_TOP, llama_cpp.TOP),
        Row(
            "decode_d2048",
            head,
            threads,
            deep,
            lambda llm: decode_rate(llm, 33, prompt=2048),
            lambda peer: peer.decode(threads, 32, 2048),
            context=2064,
        ),
    ]


def _sampled_row(
    name: str, head: Head, threads: int, target: float | None, sampling: dict[str, Any], samplers: tuple[str, ...]
) -> Row:
    return Row(
        name,
        head,
        threads,
        target,
        lambda llm: decode_rate(llm, 129, **sampling),
        lambda peer: peer.complete(threads, 129, samplers).tok_s,
        context=80,
        program=f"llama-completion {' '.join(samplers)}, evaluation and sampling",
    )


def _prefill_row(threads: int) -> Row:
    return Row("prefill512", "full", threads, 1.5, lambda llm: prefill_rate(llm, 512), lambda p: p.prefill(threads))


def _batch_row(threads: int) -> Row:
    return Row(
        "batch8",
        "full",
        threads,
        1.5,
        lambda llm: decode_rate(llm, 65, sequences=8),
        lambda peer: peer.batch(threads, 8),
        program="llama-batched-bench",
    )


def measure(row: Row, llm: LLM, peer: LlamaCpp, pairs: int) -> list[Record]:
    """A row in alternating pairs, each of our runs right after the read bandwidth with as many threads.

    The plain head's decode128 brings a second record: cpu.bus_share, the share of that bandwidth that it reaches.
    """
    ceilings: list[float] = []

    def ours() -> float:
        ceilings.append(measure_read_gbs(row.threads))
        return row.ours(llm)

    result = paired(ours, lambda: row.theirs(peer), pairs)
    record = Record(
        id=row.id,
        value=median(result.a),
        unit="tok/s",
        target=None if row.target is None else Target(of="ratio", at_least=row.target),
        peer=f"{llama_cpp.NAME}: {row.program}",
        peer_value=median(result.b),
        ratio=result.ratio(),
        samples=result.samples(),
        **surroundings(COMMAND),
    )
    if row.context is None:
        return [record]
    read, stored = (size / 1e9 for size in decode_bytes(llm.core, row.context))
    return _with_shares(row, record, result, ceilings[-pairs:], read, stored)


def _with_shares(
    row: Row, record: Record, result: PairedResult, ceilings: list[float], read: float, stored: float
) -> list[Record]:
    """read, stored: GB per token, as it is read and as the file's formats require. ceilings: GB/s."""
    shares = [rate * read / ceiling for rate, ceiling in zip(result.a, ceilings, strict=True)]
    record.ceiling_gb_s = median(ceilings)
    record.bus_share = median(shares)
    record.weight_share = record.bus_share * stored / read
    record.samples |= {"ceiling_gb_s": ceilings}
    if row.name != "decode128" or row.head != "full":
        return [record]
    share = Record(
        id=f"cpu.bus_share.t{row.threads}",
        value=median(result.a) * read,
        unit="GB/s",
        target=Target(of="bus_share", at_least=PLAIN_BUS_SHARE),
        peer="memory: reading a large array with as many threads, before each run",
        peer_value=record.ceiling_gb_s,
        ratio=median_interval(shares),
        bus_share=record.bus_share,
        ceiling_gb_s=record.ceiling_gb_s,
        samples=record.samples,
        **surroundings(COMMAND),
    )
    return [record, share]


def decode_rate(llm: LLM, tokens: int, prompt: int = 16, sequences: int = 1, **sampling: Any) -> float:
    """Tokens per second of all sequences together, after their first tokens; greedy unless `sampling` says else."""
    runs = _run(llm, [_prompt(prompt) for _ in range(sequences)], tokens, sampling)
    started = max(metrics.first_token_time or 0.0 for metrics in runs)
    return sequences * (tokens - 1) / (max(metrics.finished_time or 0.0 for metrics in runs) - started)


def prefill_rate(llm: LLM, tokens: int) -> float:
    """Prompt tokens per second, until the first token is out."""
    (metrics,) = _run(llm, [_prompt(tokens)], 1, {})
    return tokens / ((metrics.first_token_time or 0.0) - metrics.arrival_time)


def _prompt(tokens: int) -> list[int]:
    return [2, *random.choices(VOCABULARY, k=tokens - 1)]


def _run(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, sampling: dict[str, Any]) -> list[RequestMetrics]:
    params = SamplingParams(**{"temperature": 0.0} | sampling, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    return [output.metrics for output in outputs]
