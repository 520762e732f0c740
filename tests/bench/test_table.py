from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from tokenspeed.bench import peer_table, record, stats, table
from tokenspeed.contracts.errors import FormatError

ROOT = Path(__file__).resolve().parents[2]


def make(id: str = "cpu.decode128.t1", value: float = 101.254, unit: str = "tok/s", **fields: Any) -> record.Record:
    base: dict[str, Any] = {
        "command": "make bench-cpu",
        "commit": "0123456789abcdef",
        "versions": {},
        "machine": record.Machine(cpu="Test CPU", cores=3, memory_gib=7.5),
        "date": datetime.date(2026, 11, 21),
    }
    return record.Record(id=id, value=value, unit=unit, **(base | fields))


def paired(target: record.Target, **fields: Any) -> record.Record:
    ratio = stats.median_interval([1.5, 1.7, 1.625])
    return make(peer="llama.cpp 1: llama-bench", peer_value=60.04, ratio=ratio, target=target, **fields)


def test_the_page_shows_the_records():
    """After a change of the records: python -m tokenspeed.bench.table."""
    page = (ROOT / table.PAGE).read_text()
    files = table.read_all(ROOT / table.RESULTS)
    assert page == table.updated(page, files)
    readme = (ROOT / table.README).read_text()
    assert readme == table.updated_readme(readme, files)


def test_the_page_explains_every_family_of_ids():
    page = (ROOT / table.PAGE).read_text().split(table.BEGIN)[0]
    ids = [each.id for records in table.read_all(ROOT / table.RESULTS).values() for each in records]
    assert ids
    known = page.replace("*", "")
    assert [id for id in ids if not any(f"`{stem}" in known for stem in stems(id))] == []


def stems(id: str) -> list[str]:
    """cpu.batch8.t1 as itself, without its last parts, and by its room alone where that has its own line."""
    parts = id.split(".")
    return [id, *(".".join(parts[:n]) + "`" for n in range(2, len(parts))), f"{parts[0]}.`"]


@pytest.mark.parametrize(
    "entry, cells",
    [
        (
            paired(record.Target(of="ratio", at_least=1.6), bus_share=0.7849, ceiling_gb_s=38.0),
            ["101.3 tok/s", "", "60.04 (llama.cpp)", "1.62 (1.50 to 1.70, 3 pairs)", "ratio ≥ 1.6", "met", "78%"],
        ),
        (
            paired(record.Target(of="ratio", at_most=1.5)),
            ["101.3 tok/s", "", "60.04 (llama.cpp)", "1.62 (1.50 to 1.70, 3 pairs)", "ratio ≤ 1.5", "**missed**", ""],
        ),
        (make(unit="s"), ["101.3 s", "", "", "", "", "", ""]),
        (
            make(value=3.5, unit="s", runs=stats.summarise([3.5] * 6 + [7.25]), target=record.Target(at_most=4)),
            ["3.5 s", "", "", "3.5 to 7.25, 7 runs", "≤ 4", "met", ""],
        ),
        (make(unit="ms", floor=81.04, share=0.8), ["101.3 ms", "81.04 (80%)", "", "", "", "", ""]),
        (
            make(value=3.5, unit="s", runs=stats.summarise([3.5] * 6), target=record.Target(at_most=4)),
            ["3.5 s", "", "", "3.5 to 3.5, 6 runs", "≤ 4", "", ""],
        ),
    ],
)
def test_a_line_holds_every_cell(entry, cells):
    assert table.line(entry) == f"| {' | '.join([entry.id, *cells])} |"
    assert table.line(entry).count("|") == table.HEADER.count("|")


def test_fresh_tables_replace_the_old_ones_and_nothing_else(tmp_path):
    page, readme, results = tmp_path / "page.md", tmp_path / "readme.md", tmp_path / "results"
    readme.write_text(f"# Us\n{table.BEGIN}\nstale\n{table.END}\n")
    page.write_text(f"# Title\n{table.BEGIN}\nstale\n{table.END}\nlast words\n")
    record.write(results / "cpu.json", [make(), make("cpu.rss", 12.0, "MB")])
    record.write(results / "host.json", [make("host.step.b1.us", 14.137, "us")])
    table.main(["--page", str(page), "--readme", str(readme), "--results", str(results)])
    text = page.read_text()
    assert text.startswith(
        f"# Title\n{table.BEGIN}\n### cpu.json\nTest CPU, 3 cores, 2026-11-21. Commit 0123456789.\n\n| id |"
    )
    assert text.endswith(f"\n| host.step.b1.us | 14.14 us |  |  |  |  |  |  |\n{table.END}\nlast words\n")
    assert "stale" not in text + readme.read_text()
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| cpu")] == [
        "| cpu.decode128.t1",
        "| cpu.rss",
    ]
    table.main(["--page", str(page), "--readme", str(readme), "--results", str(results)])
    assert page.read_text() == text


@pytest.mark.parametrize("page", ["", f"{table.BEGIN}\n", f"{table.END}\n{table.BEGIN}\n"])
def test_a_page_without_its_markers_is_refused(page):
    with pytest.raises(FormatError, match="needs a line"):
        table.updated(page, {})


def gpu_row(id: str, value: float, floor: float) -> record.Record:
    return make(f"h200.{id}", value, "ms", floor=floor, share=floor / value)


def test_rows_stand_beside_the_best_of_the_others():
    """SGLang took 4.85 ms where vLLM took 4.88; nobody has measured the third."""
    measured = [gpu_row("llama-3.1-8b.bf16.decode.b1", 4.0, 3.2), gpu_row("llama-3.1-8b.bf16.ttft1024", 20.0, 19.0)]
    measured.append(gpu_row("qwen3-30b-a3b.bf16.decode.b1", 3.0, 1.5))
    files = {"h200.json": [*measured, gpu_row("llama-3.1-8b.int4.decode.b1", 1.6, 1.04)]}
    lines = peer_table.section(files).splitlines()
    assert "| h200.llama-3.1-8b.bf16.decode.b1 | 4 | 3.2 (80%) | 4.88 | 4.85 | 1.21 |" in lines
    assert "| h200.llama-3.1-8b.bf16.ttft1024 | 20 | 19 (95%) | 24.8 | 29 | 1.24 |" in lines
    assert "| h200.llama-3.1-8b.int4.decode.b1 | 1.6 | 1.04 (65%) | not run | not run |  |" in lines
    assert "| h200.qwen3-30b-a3b.bf16.decode.b1 | 3 | 1.5 (50%) | 4.17 | not run |  |" in lines
    missing = next(line for line in lines if line.startswith("- ours"))
    assert "`h200.gpt-oss-20b.mxfp4.decode.b128`" in missing
    assert "llama-3.1-8b.bf16.decode.b1`" not in missing
    assert peer_table.section({"cpu.json": [make()]}) == ""


def test_the_ratios_of_the_readme():
    pairs = paired(record.Target(of="ratio", at_least=1.6), bus_share=0.7849, ceiling_gb_s=38.0)
    text = peer_table.ratios({"cpu.json": [pairs], "h200.json": [gpu_row("llama-3.1-8b.bf16.decode.b32", 6.0, 4.2)]})
    assert text.splitlines()[2:] == [
        "| CPU, Gemma 3 270M: decoding, 1 thread | llama.cpp | 1.62 x (1.50 to 1.70) | 78% |",
        "| H200, Llama-3.1-8B bf16: decoding, 32 users | SGLang 0.5.17 | 1.02 x | 70% |",
    ]
