"""A decode step of an opened model, record by record: what each must move, its floor, and what it takes.

On a GPU a profile tells by how much each record moves the end of everything forward, and how long nothing ran before
it; on a CPU the walk takes the time of each of its kernels. Both add up to the step.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenspeed.bench.gpu.floors import decode_work_of
from tokenspeed.bench.gpu.setup import drain, request
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.engine.llm import LLM
from tokenspeed.models.registry import shipped_configs
from tokenspeed.observability.ceilings import Ceilings
from tokenspeed.program.plan import Planned
from tokenspeed.runner.cpu_backend import CpuBackend
from tokenspeed.sol.floor import Floor, ceilings_for, record_floor, total

STEPS = 64
"""Decode steps that figures are means of; those of a GPU are some in their middle."""
PREFILL_TOKENS = 16384
"""Of a GPU's step: so many that all sequences decode long before the first ends."""


@dataclass(frozen=True)
class Spent:
    """What a record takes, or something around the records: microseconds of a step. gap_us: before it, in which
    nothing ran. floor: None around the records."""

    op: str
    by: str
    weights: tuple[str, ...]
    floor: Floor | None
    us: float
    gap_us: float


@dataclass(frozen=True)
class MeasuredPlan:
    """A step of `step_us` microseconds, to which its rows add up."""

    model: str
    machine: str
    batch: int
    context: int
    rows: list[Spent]
    step_us: float

    @property
    def floor(self) -> Floor:
        """Of all records."""
        return total([row.floor for row in self.rows if row.floor])

    def as_json(self) -> dict[str, Any]:
        """As JSON values; times in microseconds."""
        return {
            "model": self.model,
            "machine": self.machine,
            "batch": self.batch,
            "context": self.context,
            "rows": [_json(row) for row in self.rows],
            "step_us": self.step_us,
            "floor_us": self.floor.seconds * 1e6,
            "bytes": round(self.floor.cost.bytes),
        }

    def text(self) -> str:
        """As a table, in the order of the step."""
        head = f"{self.model} on {self.machine}: batch {self.batch}, context {self.context}, measured"
        titles = f"{'op':<30}{'by':<28}{'MB':>10}{'floor us':>10}{'us':>10}{'gap us':>9}{'share':>7}  weights"
        floor = self.floor
        us, gaps = sum(row.us for row in self.rows), sum(row.gap_us for row in self.rows)
        whole = Spent("step", "", (), floor, us, gaps)
        return "\n".join([head, "", titles, *map(_line, self.rows), _line(whole), f"{us + gaps:.1f} us in all"])


def _line(row: Spent) -> str:
    moved = f"{row.floor.cost.bytes / 1e6:>10.3f}{row.floor.seconds * 1e6:>10.2f}" if row.floor else " " * 20
    spent = row.us + row.gap_us
    share = f"{row.floor.seconds * 1e6 / spent:>7.0%}" if row.floor and spent else " " * 7
    return f"{row.op:<30}{row.by:<28}{moved}{row.us:>10.2f}{row.gap_us:>9.2f}{share}  {' '.join(row.weights)}".rstrip()


def _json(row: Spent) -> dict[str, Any]:
    costs = {"bytes": round(row.floor.cost.bytes), "floor_us": row.floor.seconds * 1e6} if row.floor else {}
    return {"op": row.op, "by": row.by, "weights": list(row.weights), **costs, "us": row.us, "gap_us": row.gap_us}


def measured_plan(
    model: str | None, gpu: str | None, batch: int, context: int, quantization: str, kv_cache_dtype: str
) -> MeasuredPlan:
    """Open a model (a shipped config with random weights) on a GPU where there is one, and measure it.

    gpu: whose ceilings the floors are of; by default those of the machine. Raises ConfigError where they are not known
    or the step is not one that can be taken apart, and the errors of `LLM`.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ceilings = _ceilings(gpu, device)
    llm = LLM(
        model,
        load_format="dummy" if model in shipped_configs() else "auto",
        device=device,
        quantization=None if quantization == "none" else quantization,
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=False,
        max_num_seqs=batch,
        max_num_batched_tokens=PREFILL_TOKENS if device == "cuda" else None,
        max_model_len=context + STEPS + 2,
    )
    try:
        rows, step_us = (gpu_rows if device == "cuda" else cpu_rows)(llm, batch, context, ceilings)
    finally:
        llm.close()
    return MeasuredPlan(str(model or "demo"), ceilings.machine, batch, context, rows, step_us)


def _ceilings(gpu: str | None, device: str) -> Ceilings:
    if gpu is not None or device == "cpu":
        return ceilings_for(gpu)
    from tokenspeed.bench.gpu.ceilings import ceilings_of

    found = ceilings_of(device)
    if found is None:
        raise ConfigError("the ceilings of this device are not known: name a --gpu")
    return found


def cpu_rows(llm: LLM, batch: int, context: int, ceilings: Ceilings, steps: int = STEPS) -> tuple[list[Spent], float]:
    """The records of a step, the rest of it, and its microseconds. Raises ConfigError without the C++ walk."""
    backend = llm.core.backend
    if not isinstance(backend, CpuBackend):
        raise ConfigError(f"--measured needs the C++ walk; this model runs by {backend.name}")
    drawn: Counter[str] = Counter()

    def step() -> None:
        for update in llm.core.step():
            drawn[update.request_id] += len(update.new_token_ids)

    for number in range(batch):
        llm.core.add(request(llm, str(number), context, steps + 1))
    while len(drawn) < batch or not all(drawn.values()):
        step()
    before, told, started = drawn.total(), backend.time_records(), time.perf_counter()
    while llm.core.has_work:
        step()
    passes = max(1.0, (drawn.total() - before) / batch)
    step_us = (time.perf_counter() - started) * 1e6 / passes
    drain(llm)
    spent = [seconds * 1e6 / passes for _, seconds in told()]
    rows = _rows(llm, [planned for planned, _ in told()], spent, [0.0] * len(spent), batch, context, ceilings)
    return [*rows, Spent("the host's part", "", (), None, step_us - sum(spent), 0.0)], step_us


def gpu_rows(llm: LLM, batch: int, context: int, ceilings: Ceilings, steps: int = STEPS) -> tuple[list[Spent], float]:
    """The same of a GPU's captured step; around the records are its inputs, sampling and copies."""
    from tokenspeed.bench.gpu.profile import per_record

    walked, found = per_record(llm, batch, context, steps + 1)
    us: dict[str, float] = defaultdict(float)
    gaps: dict[str, float] = defaultdict(float)
    for line in found.lines:
        us[line.op] += line.advance / found.steps
        gaps[line.op] += line.idle / found.steps
    names = list(map(str, range(len(walked))))
    rows = _rows(llm, walked, [us[name] for name in names], [gaps[name] for name in names], batch, context, ceilings)
    around = {op: Spent(op, "", (), None, us[op], gaps[op]) for op in us if op not in names}
    first = [around.pop(op) for op in ("prepare",) if op in around]
    return [*first, *rows, *around.values()], found.span / found.steps


def _rows(
    llm: LLM,
    planned: Sequence[Planned],
    us: Sequence[float],
    gaps: Sequence[float],
    batch: int,
    context: int,
    ceilings: Ceilings,
) -> list[Spent]:
    program, fp8 = llm.core.model.program, llm.core.config.quantization == "fp8"
    fp8 = fp8 or llm.core.model.definition.multiplies_fp8
    work = decode_work_of(llm, batch, context + STEPS // 2)
    return [
        Spent(
            each.record.op,
            each.implementation.name,
            tuple(each.record.weights),
            record_floor(program, each.record, work, ceilings, fp8),
            float(took),
            float(gap),
        )
        for each, took, gap in zip(planned, us, gaps, strict=True)
    ]
