"""Our rows of one H200 beside what other engines took there, what was not run, and the ratios of the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenspeed.bench.gpu.peers import CARD, DECODE_MS, FIRST_MS, OTHER_WORK
from tokenspeed.bench.gpu.targets import DECODE_MS as WANTED
from tokenspeed.bench.gpu.targets import FIRST_MS as WANTED_FIRST
from tokenspeed.bench.record import Record

Files = Mapping[str, Sequence[Record]]
NEVER = (
    "TensorRT-LLM on any card; SGLang with Qwen3-30B-A3B; vLLM and SGLang with gpt-oss-20b, int4 or other contexts",
    "anything on an H100, a B200 or an MI350X, or on more than one GPU: `tokenspeed sol` tells their floors alone",
)
"""Known without a record."""
METHOD = (
    "Ours from the records below. Theirs were measured on the same kind of card by our method, in runs of their own: "
    "offline, greedy, `ignore_eos`, no prefix cache, 1024 random ids in, random weights of the real shapes, "
    "(T(129) - T(1)) / 128, medians of three; driver 580, CUDA 13.0, torch 2.11; vLLM the better of two modes, "
    "SGLang with PyTorch's sampling. vLLM's experts were chosen by its own random router, ours by seeded uniform "
    "noise: there its figure is context and no comparison."
)
ON_THE_CPU = {
    "cpu.decode128.t1": "decoding, 1 thread",
    "cpu.decode128.t2": "decoding, 2 threads",
    "cpu.decode128.t2.screened": "decoding, 2 threads, exact screened head",
    "cpu.batch8.t2": "8 sequences together, 2 threads",
    "cpu.prefill512.t2": "a prompt of 512, 2 threads",
    "server.peer.c1.tok_s": "served over HTTP, 1 request at once",
}
ON_A_GPU = {
    "llama-3.1-8b.bf16": "Llama-3.1-8B bf16",
    "llama-3.1-8b.fp8": "Llama-3.1-8B fp8",
    "llama-3.2-1b.bf16": "Llama-3.2-1B bf16",
}


class Row(NamedTuple):
    """A row of ours and the milliseconds of others, by engine."""

    record: Record
    theirs: dict[str, float]

    @property
    def best(self) -> tuple[str, float] | None:
        """The fastest of the others; None where none did the same work."""
        if any(self.record.id.startswith(f"{CARD}.{model}.") for model in OTHER_WORK):
            return None
        return min(self.theirs.items(), key=lambda item: item[1], default=None)


def rows(files: Files) -> list[Row]:
    """Decode rows at 1024 tokens and first tokens, of every model with targets or peers, the dense ones first."""
    by_id = {record.id: record for records in files.values() for record in records}
    found = []
    for model in dict.fromkeys([*WANTED, *(model for figures in DECODE_MS.values() for model in figures)]):
        batches = sorted({*WANTED.get(model, {}), *(b for each in DECODE_MS.values() for b in each.get(model, {}))})
        for batch in batches:
            record = by_id.get(f"{CARD}.{model}.decode.b{batch}")
            theirs = {engine: each[model][batch] for engine, each in DECODE_MS.items() if batch in each.get(model, {})}
            found += [Row(record, theirs)] if record else []
        record = by_id.get(f"{CARD}.{model}.ttft1024")
        found += [Row(record, {n: each[model] for n, each in FIRST_MS.items() if model in each})] if record else []
    return found


def section(files: Files) -> str:
    """The table and what was not run; nothing where no row is of that card."""
    found = rows(files)
    if not found:
        return ""
    engines = list(DECODE_MS)
    head = ["id", "ours, ms", "floor (share)", *(f"{engine}, ms" for engine in engines), "best of them over ours"]
    lines = [
        "### One H200 beside other engines",
        METHOD,
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in found:
        ratio = f"{row.best[1] / row.record.value:.2f}" if row.best else ""
        share = f"{row.record.floor:.4g} ({row.record.share:.0%})" if row.record.floor and row.record.share else ""
        theirs = [f"{row.theirs[engine]:.4g}" if engine in row.theirs else "not run" for engine in engines]
        lines.append(f"| {' | '.join([row.record.id, f'{row.record.value:.4g}', share, *theirs, ratio])} |")
    told = {row.record.id for row in found}
    missing = [f"`{id}`" for id in _wanted() if id not in told]
    ours = [f"ours, though they have targets: {', '.join(missing)}"] if missing else []
    return "\n".join([*lines, "", "Not run:", *(f"- {each}" for each in (*ours, *NEVER))]) + "\n"


def _wanted() -> list[str]:
    decode = [f"{CARD}.{model}.decode.b{batch}" for model, row in WANTED.items() for batch in row]
    return decode + [f"{CARD}.{model}.ttft1024" for model in WANTED_FIRST]


def ratios(files: Files) -> str:
    """The table of the README: on the CPU the ratio and its interval, on the GPU the best of the others over ours."""
    lines = ["| | against | how much faster | of the floor |", "|---|---|---|---|"]
    by_id = {record.id: record for records in files.values() for record in records}
    for id, what in ON_THE_CPU.items():
        record = by_id.get(id)
        if record is not None and record.ratio is not None:
            ratio = record.ratio
            times = f"{ratio.median:.2f} x ({ratio.low:.2f} to {ratio.high:.2f})"
            share = f"{record.bus_share:.0%}" if record.bus_share is not None else ""
            lines.append(f"| CPU, Gemma 3 270M: {what} | llama.cpp | {times} | {share} |")
    found = {row.record.id: row for row in rows(files)}
    for model, name in ON_A_GPU.items():
        for batch in (1, 32, 128):
            row = found.get(f"{CARD}.{model}.decode.b{batch}")
            if row is not None and row.best is not None:
                share = f"{row.record.share:.0%}" if row.record.share else ""
                users = "1 user" if batch == 1 else f"{batch} users"
                times = f"{row.best[1] / row.record.value:.2f} x"
                lines.append(f"| H200, {name}: decoding, {users} | {row.best[0]} | {times} | {share} |")
    return "\n".join(lines) + "\n"
