"""The time below which a step cannot go: for each op the larger of bytes over bandwidth and operations over rate. No
torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenspeed.contracts.errors import ConfigError, WeightError
from tokenspeed.formats.blocks import row_bytes
from tokenspeed.formats.checkpoint import Checkpoint
from tokenspeed.observability.ceilings import Ceilings, read_ceilings
from tokenspeed.ops.definitions import KV_ITEM_BYTES, OPS, Cost, Workload, kv_entry_bytes
from tokenspeed.program.program import Program, Record
from tokenspeed.quantization.groups import (
    GPU_MODES,
    HEADS,
    MODES,
    gpu_bytes,
    quantized_format,
    refuse_quantized,
    refuse_stored,
)
from tokenspeed.weights.layouts import planned_bytes, source_bytes, tensors_of
from tokenspeed.weights.spec import WeightSpec, WeightTable

GPUS = {
    "H200": Ceilings("NVIDIA H200", 4600.0, 770.0, 1410.0, memory_gb=141.0),
    "H100": Ceilings("NVIDIA H100 SXM (data sheet)", 3350.0, 989.0, 1979.0, memory_gb=80.0),
    "B200": Ceilings("NVIDIA B200 (data sheet)", 8000.0, 2250.0, 4500.0, memory_gb=180.0),
    "MI350X": Ceilings("AMD MI350X (data sheet)", 8000.0, 2300.0, 4600.0, memory_gb=288.0),
}
"""H200 as measured, benchmarks/README.md says how. The others as their makers publish them, matrix rates without
sparsity: no kernel reaches those (H200's own: 4800, 989, 1979), so floors by them are lower than measured ones."""
QUANTIZATIONS = ("none", *GPU_MODES)


def ceilings_for(gpu: str | None) -> Ceilings:
    """Of a GPU by name, or of this machine as `doctor --measure` found them. Raises ConfigError where there are
    none."""
    if gpu is None:
        found = read_ceilings()
        if found is None:
            raise ConfigError("this machine has not been measured: run `tokenspeed doctor --measure`, or name a --gpu")
        return found
    known = {name.lower(): value for name, value in GPUS.items()}
    if gpu.lower() not in known:
        raise ConfigError(f"--gpu {gpu}: no ceilings known (known: {', '.join(GPUS)})")
    return known[gpu.lower()]


def stored_bytes(
    table: WeightTable, checkpoint: Checkpoint | None, quantization: str, gpu: bool = False
) -> dict[str, float]:
    """Bytes of each weight: as the checkpoint has it, or bf16, or as the engine quantises it at load, which it does
    differently on a GPU. Raises ConfigError as that does for weights that are quantised already."""
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"--quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    if table.quantization is not None:
        refuse_stored(quantization, table.quantization.method)
        return {name: _stored_bytes(table, spec, checkpoint) for name, spec in table.specs.items()}
    by_gpu = gpu or quantization not in MODES
    return {name: _weight_bytes(spec, checkpoint, quantization, by_gpu) for name, spec in table.specs.items()}


def _stored_bytes(table: WeightTable, spec: WeightSpec, checkpoint: Checkpoint | None) -> float:
    """Of a checkpoint that is quantised; without its tensors as its config says."""
    if checkpoint is None:
        planned = planned_bytes(table, spec)
        return _weight_bytes(spec, None, "none", True) if planned is None else planned
    sources = spec.sources(checkpoint)
    wanted = [name for source in sources for name in tensors_of(table, spec, source, checkpoint)]
    _check_there(wanted, checkpoint)
    return sum(source_bytes(checkpoint, table, spec, source) for source in sources)


def _check_there(names: list[str], checkpoint: Checkpoint) -> None:
    missing = [name for name in names if name not in checkpoint.tensors]
    if missing:
        raise WeightError(f"{checkpoint.path}: the checkpoint lacks {', '.join(missing)}")


def _weight_bytes(spec: WeightSpec, checkpoint: Checkpoint | None, quantization: str, gpu: bool) -> float:
    narrow = gpu and quantization in GPU_MODES and spec.kind in ("linear", "experts") and spec.name not in HEADS
    if checkpoint is None:
        stored = "F32" if spec.kind == "vector" else spec.dummy_format
        if narrow:
            if quantization != "fp8":
                refuse_quantized(quantization, spec.name, (stored,))
            return gpu_bytes(quantization, spec.rows, spec.cols)
        return _rows_bytes(spec, spec.rows, stored, "none" if gpu else quantization)
    sources = spec.sources(checkpoint)
    _check_there([source.name for source in sources], checkpoint)
    found = [(source, checkpoint.tensors[source.name]) for source in sources]
    if gpu and spec.kind != "vector" and quantization in ("int8", "int4", "mxfp4"):
        refuse_quantized(quantization, spec.name, [info.dtype for _, info in found])
    if narrow:
        return gpu_bytes(quantization, spec.rows, spec.cols)
    if gpu or spec.kind == "vector":
        return sum(spec.source_bytes(source, info) for source, info in found)
    return sum(_rows_bytes(spec, source.rows, info.dtype, quantization) for source, info in found)


def _rows_bytes(spec: WeightSpec, rows: int, fmt: str, quantization: str) -> int:
    """Bytes of some rows of a weight that come as `fmt`."""
    if spec.kind == "vector":
        return row_bytes(fmt, rows)
    if quantization in MODES:
        fmt = quantized_format(quantization, spec.name, spec.kind, spec.cols, fmt)
    return rows * row_bytes(fmt, spec.cols)


def kv_element_bytes(dtype: str, head_dim: int) -> float:
    """Bytes of each element of a key or value, scales included. Raises ConfigError for an unknown type."""
    if dtype not in KV_ITEM_BYTES:
        raise ConfigError(f"--kv-cache-dtype must be one of {', '.join(KV_ITEM_BYTES)}, got {dtype!r}")
    return kv_entry_bytes(dtype, head_dim) / head_dim


def decode_work(
    batch: int, context: int, weight_bytes: Mapping[str, float], act_bytes: float = 2, kv_bytes: float = 2
) -> Workload:
    """One decode step: a token for each of `batch` sequences, which then hold `context` tokens each."""
    for name, value in (("--batch", batch), ("--context", context)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    return Workload(batch, batch, batch, context, act_bytes, kv_bytes, weight_bytes)


def prefill_work(
    batch: int, tokens: int, weight_bytes: Mapping[str, float], act_bytes: float = 2, kv_bytes: float = 2
) -> Workload:
    """Prompts of `batch` sequences of `tokens` each in one step, with the logits of their last ones."""
    decode_work(batch, tokens, weight_bytes)
    return Workload(batch * tokens, batch, batch, tokens, act_bytes, kv_bytes, weight_bytes)


@dataclass(frozen=True)
class Floor:
    """Cost and least time in seconds of some records; `bound` is what most of the time is spent on."""

    cost: Cost
    seconds: float
    bound: str


def record_floor(program: Program, record: Record, work: Workload, ceilings: Ceilings, fp8: bool) -> Floor:
    """Floor of one record; of a fused one, the sum over the plain ops in it, so grouping changes no total."""
    memory = compute = 0.0
    for part in record.plain():
        cost = OPS[part.op].cost(program.operands(part), work)
        by_bytes = cost.bytes / (ceilings.read_gbs * 1e9)
        by_flops = cost.flops / (_rate(part, ceilings, fp8) * 1e12) if ceilings.bf16_tflops else 0.0
        if by_bytes >= by_flops:
            memory += by_bytes
        else:
            compute += by_flops
    return Floor(program.cost(record, work), memory + compute, "memory" if memory >= compute else "compute")


def _rate(record: Record, ceilings: Ceilings, fp8: bool) -> float:
    quantized = fp8 and record.op in ("linear", "experts") and not {*HEADS, "embed"} & set(record.weights)
    return (ceilings.fp8_tflops or ceilings.bf16_tflops) if quantized else ceilings.bf16_tflops


def total(floors: list[Floor]) -> Floor:
    """Sum of floors."""
    seconds = sum(floor.seconds for floor in floors)
    memory = sum(floor.seconds for floor in floors if floor.bound == "memory")
    cost = sum((floor.cost for floor in floors), Cost())
    return Floor(cost, seconds, "memory" if 2 * memory >= seconds else "compute")
