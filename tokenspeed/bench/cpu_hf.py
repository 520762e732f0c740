"""Decode on the CPU against Hugging Face transformers, in alternating pairs: `python -m tokenspeed.bench.cpu_hf`.

Both run the demo model greedily on all processors: ours as `generate` does by default, transformers in bf16 on the same
weights. A decode rate is (n - 1) / (T(n) - T(1)), so prompt and start-up cancel.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tokenspeed.bench.hf import hf_model
from tokenspeed.bench.record import Record, Target, surroundings, write
from tokenspeed.bench.stats import paired, summarise
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.models.registry import shipped_configs
from tokenspeed.weights.loader import load_weights

PROMPT = "The history of computing began long before the modern computer, when"
TOKENS = 65
RESULTS = Path("benchmarks/results/cpu.json")
LOADS = 7


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    around = surroundings("python -m tokenspeed.bench.cpu_hf")
    load = [_timed(lambda: LLM(dtype="bfloat16").close()) for _ in range(LOADS)]
    llm = LLM(dtype="bfloat16")
    ids = llm.get_tokenizer().encode(PROMPT)
    ours, theirs = _ours(llm, ids), _theirs(llm, ids)
    if ours(TOKENS)[:8] != theirs(TOKENS)[:8]:
        raise RuntimeError("the two engines do not give the same tokens")
    result = paired(lambda: _rate(ours), lambda: _rate(theirs), pairs=options.pairs)
    ratio = result.ratio()
    import transformers

    threads = len(os.sched_getaffinity(0))
    records = [
        Record(
            id=f"cpu.hf.decode64.t{threads}",
            value=median(result.a),
            unit="tok/s",
            peer=f"transformers {transformers.__version__} bf16",
            peer_value=median(result.b),
            ratio=ratio,
            target=Target(of="ratio", at_least=1.0),
            samples=result.samples(),
            **around,
        ),
        Record(
            id="cpu.load.s",
            value=summarise(load).lower_quartile,
            unit="s",
            target=Target(at_most=2.0),
            samples={"load": load},
            **around,
        ),
    ]
    write(options.out, records)
    print(f"decode: {median(result.a):.1f} tok/s, transformers {median(result.b):.1f} tok/s, ratio {ratio}")
    print(f"load: {summarise(load)}")


def _ours(llm: LLM, ids: list[int]) -> Callable[[int], list[int]]:
    def run(tokens: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        torch.set_num_threads(1)
        return llm.generate(prompt_token_ids=ids, sampling_params=params, use_tqdm=False)[0].outputs[0].token_ids

    return run


def _theirs(llm: LLM, ids: list[int]) -> Callable[[int], list[int]]:
    files = llm.core.files
    assert files.checkpoint is not None
    weights = load_weights(files.checkpoint, files.definition.weights)
    model: Any = hf_model(shipped_configs()["gemma-3-270m"], files.definition, weights, torch.bfloat16)
    prompt = torch.tensor([ids])

    threads = len(os.sched_getaffinity(0))

    def run(tokens: int) -> list[int]:
        torch.set_num_threads(threads)  # the engine leaves torch one thread
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
        return out[0, len(ids) :].tolist()

    return run


def _rate(run: Callable[[int], list[int]]) -> float:
    first = _timed(lambda: run(1))
    return (TOKENS - 1) / (_timed(lambda: run(TOKENS)) - first)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
