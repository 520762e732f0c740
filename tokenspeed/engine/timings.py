"""What one run reports: rates, bytes per token, and the share of what the memory can give."""

from __future__ import annotations

from typing import Any

from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.floor import step_bytes
from tokenspeed.engine.output import RequestOutput
from tokenspeed.observability.ceilings import Ceilings


def decode_bytes(core: EngineCore, context: int) -> tuple[float, float]:
    """Bytes that a decode step of one sequence reads, and those it had to read of weights as their file stores them."""
    model, kv_bytes = core.model, core.page_shape.element_bytes
    read = step_bytes(model, core.backend.weight_bytes, kv_bytes, 1, context)
    return read, step_bytes(model, model.file_bytes, kv_bytes, 1, context)


def run_timings(core: EngineCore, output: RequestOutput, ceilings: Ceilings | None) -> dict[str, Any]:
    """`timings` of a request that ran alone. Rates in tokens/s, GB are 1e9 bytes; shares are of the read bandwidth.

    bus_share counts the bytes really read, weight_share those the file's own formats would need.
    """
    clock, completion = core.clock, output.outputs[0]
    timings: dict[str, Any] = {
        "backend": core.backend.name,
        "fallback_ops": list(core.backend.fallback_ops),
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "completion_tokens": len(completion.token_ids),
        **output.metrics.timings(len(completion.token_ids)),
    }
    if clock.prefill_s:
        timings["prefill_tok_s"] = clock.prefill_tokens / clock.prefill_s
    if clock.decode_s:
        read, stored = decode_bytes(core, len(output.prompt_token_ids) + len(completion.token_ids) // 2)
        rate = clock.decode_steps / clock.decode_s
        timings |= {
            "decode_tok_s": clock.decode_tokens / clock.decode_s,
            "gb_per_token": read / 1e9,
            "gb_s": read * rate / 1e9,
        }
        if ceilings is not None:
            timings["read_ceiling_gb_s"] = ceilings.read_gbs
            timings["bus_share"] = read * rate / 1e9 / ceilings.read_gbs
            timings["weight_share"] = stored * rate / 1e9 / ceilings.read_gbs
    return timings


def timings_line(timings: dict[str, Any]) -> str:
    """The timings of a run in one line."""
    parts = []
    if "prefill_tok_s" in timings:
        parts.append(f"prefill {timings['prefill_tok_s']:.0f} tok/s")
    if "decode_tok_s" in timings:
        parts.append(f"decode {timings['decode_tok_s']:.1f} tok/s")
        parts.append(f"{timings['gb_per_token']:.3f} GB per token")
        share = f", {timings['bus_share']:.0%} of {timings['read_ceiling_gb_s']:.1f}" if "bus_share" in timings else ""
        parts.append(f"{timings['gb_s']:.1f} GB/s{share}")
    if "ttft_ms" in timings:
        parts.append(f"first token {timings['ttft_ms']:.0f} ms")
    return " | ".join(parts)
