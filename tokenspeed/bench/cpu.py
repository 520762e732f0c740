"""This engine against llama.cpp on the CPU: the demo file, the same threads, in alternating pairs of one run.

`make bench-cpu`, or `python -m tokenspeed.bench.cpu`. A decode rate of ours counts the tokens after the first of every
sequence, from the last first token to the end, through `LLM.generate`; llama.cpp's is what its own benchmark reports.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tokenspeed.bench import llama_cpp
from tokenspeed.bench.ceilings import measure_read_gbs
from tokenspeed.bench.record import Record, Target, surroundings, write
from tokenspeed.bench.stats import paired
from tokenspeed.config.demo import demo_model_path
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.output import RequestMetrics
from tokenspeed.engine.timings import decode_bytes

RESULTS = Path("benchmarks/results/cpu.json")
PAIRS = 7
Rate = Callable[[], float]


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", default=["decode128", "decode_d2048", "prefill512", "batch8"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    programs, model = llama_cpp.build(), demo_model_path()
    for threads in options.threads:
        llm = LLM(threads=threads, enable_prefix_caching=False, max_model_len=4096)
        for name, (ours, theirs, target) in workloads(llm, programs, model, threads).items():
            if name in options.only:
                record = compare(f"cpu.{name}.t{threads}", ours, theirs, target, options.pairs, llm)
                write(options.out, [record])
        llm.close()


def workloads(llm: LLM, programs: Path, model: Path, threads: int) -> dict[str, tuple[Rate, Rate, float]]:
    """Per workload our rate, llama.cpp's, and the ratio to reach."""
    short, deep = _prompt(16), _prompt(2048)
    return {
        "decode128": (
            lambda: _decode(llm, [short], 129),
            lambda: llama_cpp.decode_rate(programs, model, threads),
            1.6,
        ),
        "decode_d2048": (
            lambda: _decode(llm, [deep], 33),
            lambda: llama_cpp.decode_rate(programs, model, threads, 32, 2048),
            1.6 if threads == 1 else 1.5,
        ),
        "prefill512": (
            lambda: _prefill(llm, _prompt(512)),
            lambda: llama_cpp.prefill_rate(programs, model, threads),
            1.5,
        ),
        "batch8": (
            lambda: _decode(llm, [_prompt(16) for _ in range(8)], 65),
            lambda: llama_cpp.batch_rate(programs, model, threads, 8),
            1.5,
        ),
    }


def compare(name: str, ours: Rate, theirs: Rate, target: float, pairs: int, llm: LLM) -> Record:
    """One workload in alternating pairs, beside the read bandwidth of the same run."""
    ceiling = measure_read_gbs()
    result = paired(ours, theirs, pairs)
    ratio = result.ratio()
    value = median(result.a)
    fields = {}
    if name.startswith("cpu.decode128"):
        read, stored = decode_bytes(llm.core, 80)
        fields = {
            "ceiling_gb_s": ceiling,
            "bus_share": read * value / 1e9 / ceiling,
            "weight_share": stored * value / 1e9 / ceiling,
        }
    print(f"{name}: {value:.1f} tok/s, llama.cpp {median(result.b):.1f}, ratio {ratio.median:.2f} {fields}", flush=True)
    return Record(
        id=name,
        value=value,
        unit="tok/s",
        target=Target(of="ratio", at_least=target),
        peer=f"llama.cpp of llama-cpp-python {llama_cpp.VERSION}, built with GGML_NATIVE",
        peer_value=median(result.b),
        ratio=ratio,
        samples=result.samples(),
        **fields,
        **surroundings("make bench-cpu"),
    )


def _prompt(tokens: int) -> list[int]:
    return [2, *(random.randrange(1000, 200000) for _ in range(tokens - 1))]


def _run(llm: LLM, prompts: list[list[int]], tokens: int) -> list[RequestMetrics]:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    return [output.metrics for output in outputs]


def _prefill(llm: LLM, prompt: list[int]) -> float:
    (metrics,) = _run(llm, [prompt], 1)
    return len(prompt) / ((metrics.first_token_time or 0.0) - metrics.arrival_time)


def _decode(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    runs = _run(llm, prompts, tokens)
    started = max(metrics.first_token_time or 0.0 for metrics in runs)
    return len(prompts) * (tokens - 1) / (max(metrics.finished_time or 0.0 for metrics in runs) - started)


if __name__ == "__main__":
    main()
