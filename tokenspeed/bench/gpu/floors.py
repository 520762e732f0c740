"""The time below which a step of an opened model cannot go."""

from __future__ import annotations

from tokenspeed.engine.llm import LLM
from tokenspeed.observability.ceilings import Ceilings
from tokenspeed.ops.definitions import Workload
from tokenspeed.sol.floor import decode_work, record_floor


def decode_floor_ms(llm: LLM, batch: int, context: int, ceilings: Ceilings | None) -> float | None:
    """Of a token for each of `batch` sequences that then hold `context`; None without ceilings."""
    return _floor_ms(llm, decode_work_of(llm, batch, context), ceilings)


def decode_work_of(llm: LLM, batch: int, context: int) -> Workload:
    """Such a step, with the model's own bytes."""
    return decode_work(batch, context, llm.core.backend.weight_bytes, *_sizes(llm))


def prefill_floor_ms(llm: LLM, tokens: int, ceilings: Ceilings | None) -> float | None:
    """Of a whole prompt in one step, with the logits of its last token."""
    weights = llm.core.backend.weight_bytes
    return _floor_ms(llm, Workload(tokens, 1, 1, tokens, *_sizes(llm), weights), ceilings)


def _sizes(llm: LLM) -> tuple[int, int]:
    return llm.core.model.dtype.itemsize, llm.core.kv_dtype.itemsize


def _floor_ms(llm: LLM, work: Workload, ceilings: Ceilings | None) -> float | None:
    if ceilings is None:
        return None
    program, fp8 = llm.core.model.program, llm.core.config.quantization == "fp8"
    return 1e3 * sum(record_floor(program, record, work, ceilings, fp8).seconds for record in program.records)
