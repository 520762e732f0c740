"""This engine against llama.cpp on the CPU: the demo file, the same threads, in alternating pairs of one run.

`make bench-cpu`, or `python -m tokenspeed.bench.cpu`. A decode rate of ours is (n - 1) / (T(n) - T(1)) through
`LLM.generate`; llama.cpp's is what its own benchmark reports for the same work.
"""

from __future__ import annotations

import argparse
import random
import time
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
            lambda: _decode(llm, short, 129),
            lambda: llama_cpp.decode_rate(programs, model, threads),
            1.6,
        ),
        "decode_d2048": (
            lambda: _decode(llm, deep, 33),
            lambda: llama_cpp.decode_rate(programs, model, threads, 32, 2048),
            1.6 if threads == 1 else 1.5,
        ),
        "prefill512": (
            lambda: 512 / _timed(llm, [_prompt(512)], 1),
            lambda: llama_cpp.prefill_rate(programs, model, threads),
            1.5,
        ),
        "batch8": (
            lambda: _batch(llm, [_prompt(16) for _ in range(8)], 65),
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


def _timed(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    return time.perf_counter() - start


def _decode(llm: LLM, prompt: list[int], tokens: int) -> float:
    first = _timed(llm, [prompt], 1)
    return (tokens - 1) / (_timed(llm, [prompt], tokens) - first)


def _batch(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    first = _timed(llm, prompts, 1)
    return len(prompts) * (tokens - 1) / (_timed(llm, prompts, tokens) - first)


if __name__ == "__main__":
    main()
