"""`python -m tokenspeed.bench.gpu.invariance`: what batch-invariant mode promises, bit by bit, and what it costs.

Twenty requests, greedy and sampled, run alone, each with an empty prefix cache. Then: among up to 63 others; with other
chunk budgets; after a prefix hit; and without asking for log-probabilities, by captured steps. Token ids and
log-probabilities must be equal to the last bit. Prints one JSON object, and each budget's part of it to
standard error as it comes; status 1 on any difference.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from tokenspeed.bench.gpu.decode import measure
from tokenspeed.bench.record import Record, surroundings, write
from tokenspeed.bench.stats import paired
from tokenspeed.bench.verify.invariance import Answer, Asked, check, make_requests, run_alone
from tokenspeed.engine.llm import LLM
from tokenspeed.quantization.groups import GPU_MODES

BUDGETS = (512, 64, 100, 2048)
"""Most tokens of a step; the first is that of the answers which others are compared with."""
BATCHES = (1, 8, 32)
MOST_ROWS = 64
COST_CONTEXT = 1024
CACHE_BYTES = 12 << 30
COMMAND = "python -m tokenspeed.bench.gpu.invariance"


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
        found[f"chunks of {budget}"] = ways = check(llm, asked, expected, MOST_ROWS, rng)
        print(f"chunks of {budget}: {json.dumps(msgspec.to_builtins(ways))}", file=sys.stderr, flush=True)
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
