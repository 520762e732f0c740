"""This engine against llama.cpp on the CPU: the demo file, the same threads, in alternating pairs of one run.

`make bench-cpu`, or `python -m tokenspeed.bench.cpu`; docs/benchmarks.md says what each id means.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

from tokenspeed.bench import llama_cpp, table
from tokenspeed.bench.cpu_process import MEASURES
from tokenspeed.bench.cpu_rows import SETTINGS, Row, measure, rows
from tokenspeed.bench.llama_cpp import LlamaCpp
from tokenspeed.bench.record import Record, write
from tokenspeed.bench.stats import GATE_RUNS
from tokenspeed.config.demo import demo_model_path
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.engine.llm import LLM

RESULTS = Path("benchmarks/results/cpu.json")
THREADS = (1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, record; write the page where the records are the published ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=GATE_RUNS, help="of each row (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="ids as a shell would match them: 'cpu.decode*'"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of records to add to (default: %(default)s)")
    options = parser.parse_args(arguments)
    wanted = select(options.only)
    peer = LlamaCpp(llama_cpp.build(), demo_model_path())
    for records in run(wanted, peer, options.pairs):
        for record in records:
            print(table.line(record), flush=True)
        write(options.out, records)
    if options.out == RESULTS:
        table.main([])


def select(patterns: Sequence[str]) -> list[str]:
    """Ids of rows and measures that match. Raises ConfigError for a pattern that none does."""
    known = [row.id for threads in THREADS for row in rows(threads)] + list(MEASURES)
    for pattern in patterns:
        if not any(fnmatchcase(each, pattern) for each in known):
            raise ConfigError(f"--only {pattern}: no such row (known: {', '.join(known)})")
    return [each for each in known if any(fnmatchcase(each, pattern) for pattern in patterns)]


def run(wanted: Sequence[str], peer: LlamaCpp, pairs: int) -> Iterator[list[Record]]:
    """Measure one after the other; rows of the same threads and head share one engine."""
    chosen = [row for threads in THREADS for row in rows(threads) if row.id in wanted]
    for (threads, head), group in groupby(sorted(chosen, key=_engine), key=_engine):
        llm = LLM(threads=threads, lm_head=head, **SETTINGS)
        _require_kernels(llm)
        for row in group:
            yield measure(row, llm, peer, pairs)
        llm.close()
    for name, measured in MEASURES.items():
        if name in wanted:
            yield [measured(peer, pairs)]


def _require_kernels(llm: LLM) -> None:
    backend = llm.core.backend
    if backend.name != "cpu" or backend.fallback_ops:
        slow = ", ".join(backend.fallback_ops) or "all ops"
        raise ConfigError(f"the {backend.name} backend has no fast kernel for {slow}: nothing worth measuring")


def _engine(row: Row) -> tuple[int, str]:
    return row.threads, row.head


if __name__ == "__main__":
    main()
