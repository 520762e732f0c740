"""`sol` for a model by name: its floor, in total and by kind of op. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.source import resolve_model
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.formats.checkpoint import Checkpoint
from tokenspeed.formats.gguf import open_gguf
from tokenspeed.formats.safetensors import open_safetensors
from tokenspeed.models.registry import Definition, define, define_from_hf, read_config, shipped_configs
from tokenspeed.observability.ceilings import Ceilings
from tokenspeed.ops.definitions import Workload
from tokenspeed.program.program import Program
from tokenspeed.sol.fit import Fit, most_within
from tokenspeed.sol.floor import (
    Floor,
    ceilings_for,
    decode_work,
    kv_element_bytes,
    prefill_work,
    record_floor,
    stored_bytes,
    total,
)

MOST_DRAWN = 1024
"""Sequences at most of a curve."""


@dataclass(frozen=True)
class StepReport:
    """The floor of one decode step."""

    model: str
    ceilings: Ceilings
    work: Workload
    quantization: str
    kv_cache_dtype: str
    by_op: Mapping[str, Floor]
    total: Floor
    fit: Fit | None = None
    """None where the machine's memory is not known."""
    prefill: bool = False
    curve: Mapping[int, Mapping[str, Floor]] = field(default_factory=dict)
    """Floors by op for other numbers of sequences, where they were asked for."""

    def summary(self) -> dict[str, Any]:
        """As JSON values; times in ms, bytes in bytes."""
        cost = self.total.cost
        return {
            "model": self.model,
            "machine": self.ceilings.machine,
            "read_gb_s": self.ceilings.read_gbs,
            "batch": self.work.batch,
            "context": self.work.context,
            "prefill": self.prefill,
            "quantization": self.quantization,
            "kv_cache_dtype": self.kv_cache_dtype,
            "weight_bytes": round(cost.weight_bytes),
            "kv_bytes": round(cost.kv_bytes),
            "flops": round(cost.flops),
            "floor_ms": self.total.seconds * 1e3,
            "tok_s": self.work.tokens / self.total.seconds,
            "bound": self.total.bound,
            **(self.fit.summary() if self.fit else {}),
        }

    def text(self) -> str:
        """As a table by op."""
        cost, ms = self.total.cost, self.total.seconds * 1e3
        kind = "a prompt, " if self.prefill else ""
        head = (
            f"{self.model} on {self.ceilings.machine}: {kind}batch {self.work.batch}, context {self.work.context}, "
            f"{self.ceilings.read_gbs:.1f} GB/s"
        )
        rows = [f"{'op':<12}{'weights MB':>12}{'KV MB':>10}{'GFLOP':>10}{'floor ms':>11}  bound"]
        for op, floor in sorted(self.by_op.items(), key=lambda item: -item[1].seconds):
            rows.append(_row(op, floor))
        rate = f"{self.work.tokens / self.total.seconds:.1f} tok/s"
        weights, kv = cost.weight_bytes / 1e9, cost.kv_bytes / 1e9
        step = f"floor {ms:.3f} ms per step of {self.work.tokens} tokens, {rate}"
        closing = f"{step}; {weights:.3f} GB of weights, {kv:.3f} GB of KV"
        last = [self.fit.text()] if self.fit else []
        return "\n".join([head, "", *rows, _row("total", self.total), "", closing, *last])


def _row(name: str, floor: Floor) -> str:
    cost = floor.cost
    return (
        f"{name:<12}{cost.weight_bytes / 1e6:>12.2f}{cost.kv_bytes / 1e6:>10.2f}{cost.flops / 1e9:>10.3f}"
        f"{floor.seconds * 1e3:>11.4f}  {floor.bound}"
    )


def find_definition(model: str | None) -> tuple[str, Definition, Checkpoint | None]:
    """Name, definition and (headers only) checkpoint of a shipped config, a directory (or the config.json
    in it), a .gguf file or a repository."""
    shipped = shipped_configs()
    if model is not None and Path(model).name == "config.json" and Path(model).is_file():
        model = str(Path(model).resolve().parent)
    if model in shipped:
        return str(model), define_from_hf(shipped[model]), None
    source = resolve_model(model, need_weights=False)
    if source.format == "gguf":
        file = open_gguf(source.path)
        return source.name, define(file), file
    has_weights = any(Path(source.path).glob("*.safetensors"))
    checkpoint = open_safetensors(source.path) if has_weights else None
    tensors = checkpoint.tensors if checkpoint else None
    return source.name, define_from_hf(read_config(source.path), None, tensors), checkpoint


def step_report(
    model: str | None,
    gpu: str | None,
    batch: int,
    context: int,
    quantization: str,
    kv_cache_dtype: str = "bfloat16",
    within_ms: float | None = None,
    prefill: bool = False,
    curve: bool = False,
) -> StepReport:
    """The floor of a decode step, or of a prompt of `context` tokens of each sequence. within_ms: a time for each
    token, for which the most sequences are looked for. curve: also of 1, 2, 4, ... sequences, up to what fits, or
    MOST_DRAWN.

    Raises ConfigError on flags out of range or that contradict each other, or a machine that is not known, or whose
    memory is not where a time is given."""
    if prefill and (within_ms is not None or curve):
        raise ConfigError("--within and --plot are about decoding: leave out --prefill")
    ceilings = ceilings_for(gpu)
    name, definition, checkpoint = find_definition(model)
    kv_bytes = kv_element_bytes(kv_cache_dtype, definition.config.head_dim)
    stored = stored_bytes(definition.weights, checkpoint, quantization, gpu is not None)
    program, fp8 = definition.program(), quantization == "fp8" or definition.multiplies_fp8

    def step(sequences: int) -> tuple[Workload, dict[str, Floor]]:
        work = (prefill_work if prefill else decode_work)(sequences, context, stored, kv_bytes=kv_bytes)
        return work, floors_by_op(program, work, ceilings, fp8)

    def floor(sequences: int) -> Floor:
        return total(list(step(sequences)[1].values()))

    work, by_op = step(batch)
    fit = None if prefill else _fit(ceilings, sum(stored.values()), floor, within_ms)
    most = min(MOST_DRAWN, fit.sequences) if fit and fit.sequences else MOST_DRAWN
    drawn = sorted({most, *(1 << n for n in range(most.bit_length()))}) if curve else []
    floors = {n: step(n)[1] for n in drawn}
    whole = total(list(by_op.values()))
    return StepReport(name, ceilings, work, quantization, kv_cache_dtype, by_op, whole, fit, prefill, floors)


def _fit(ceilings: Ceilings, held: float, floor: Callable[[int], Floor], within_ms: float | None) -> Fit | None:
    if within_ms is not None and within_ms <= 0:
        raise ConfigError(f"--within must be more than 0 ms, got {within_ms:g}")
    if not ceilings.memory_gb:
        if within_ms is not None:
            raise ConfigError("--within needs a machine whose memory is known: name a --gpu")
        return None
    usable = ceilings.memory_gb * 1e9 * EngineConfig.gpu_memory_utilization
    fit = Fit(held, floor(1).cost.kv_bytes, usable)
    if within_ms is None:
        return fit
    return replace(
        fit, within_ms=within_ms, within=most_within(within_ms, fit.sequences, lambda n: floor(n).seconds * 1e3)
    )


def floors_by_op(program: Program, work: Workload, ceilings: Ceilings, fp8: bool) -> dict[str, Floor]:
    """Floors summed by plain op."""
    grouped: dict[str, list[Floor]] = defaultdict(list)
    for record in program.records:
        for part in record.plain():
            grouped[part.op].append(record_floor(program, part, work, ceilings, fp8))
    return {op: total(floors) for op, floors in grouped.items()}
