"""`bench report`: what each picture shows, by hand-made files, and that the same data give the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.bench.test_table import make
from tokenspeed.bench.record import Machine, Record, Target, write
from tokenspeed.bench.report import history, latency, pareto, roofline, steps
from tokenspeed.bench.report.inputs import Inputs, Step, StepRow, read_inputs
from tokenspeed.bench.report.pages import Part, html, markdown
from tokenspeed.bench.report.write import write_report
from tokenspeed.cli.main import main
from tokenspeed.contracts.errors import ConfigError, FormatError

GPU = Machine(cpu="Test CPU", cores=3, memory_gib=7.5, gpu="NVIDIA H200", gpus=1)
STEP = Step(
    "demo",
    "Test CPU",
    1,
    256,
    [
        StepRow("prepare", "", [], 10.0, 0.0),
        StepRow("norm_linear", "walk", ["layers.0.qkv", "layers.0.norm"], 50.0, 5.0, 4000, 30.0),
        StepRow("norm_linear", "walk", ["layers.1.qkv", "layers.1.norm"], 40.0, 0.0, 4000, 30.0),
        StepRow("copy", "", [], 0.1, 0.1),
        StepRow("norm", "walk", ["layers.1.norm"], 0.1, 0.0, 8, 0.1),
    ],
    105.3,
    60.1,
    8008,
)


def served(prefix: str, at_once: int = 4) -> list[Record]:
    times = [float(10 + each) for each in range(20)]
    return [
        make(f"{prefix}.c{at_once}.output.tok_s", 80.0 * at_once),
        make(f"{prefix}.c{at_once}.tpot.p50", 12.5, "ms", samples={"tpot_ms": times}),
        make(f"{prefix}.c{at_once}.ttft.p50", 19.5, "ms", samples={"ttft_ms": times[::-1]}),
    ]


def test_points_of_decode_rows_stand_beside_their_floor_and_the_peers():
    row = make("h200.llama-3.1-8b.bf16.decode.b8", 4.0, "ms", machine=GPU, floor=3.2, share=0.8)
    sampled = make("h200.llama-3.1-8b.bf16.decode.b8.sampled", 5.0, "ms", machine=GPU)
    (panel,) = pareto.panels(Inputs(records=[row, sampled]))
    assert (panel.title, panel.unit) == ("llama-3.1-8b bf16", "GPU")
    assert panel.lines["TokenSpeed"] == [pytest.approx((250, 2000, 8))]
    assert panel.lines["floor"] == [pytest.approx((312.5, 2500, 8))]
    assert panel.lines["vLLM 0.24"] == [pytest.approx((1e3 / 5.22, 8e3 / 5.22, 8))]


def test_figures_of_other_work_are_named_so():
    row = make("h200.qwen3-30b-a3b.bf16.decode.b8", 8.0, "ms", machine=GPU)
    (panel,) = pareto.panels(Inputs(records=[row]))
    assert list(panel.lines) == ["TokenSpeed", "vLLM 0.24, experts by its own router"]


def test_points_of_loads_are_lines_by_engine():
    records = [*served("serve.bench", 1), *served("serve.bench", 4)]
    for engine, speed in (("ours", 50.0), ("llama", 40.0)):
        records.append(make(f"compare.agentic.c2.{engine}.output.tok_s", 2 * speed))
        records.append(make(f"compare.agentic.c2.{engine}.user.tok_s", speed))
    agentic, bench = pareto.panels(Inputs(records=records))
    assert agentic.lines == {"TokenSpeed": [(50.0, 100.0, 2)], "llama": [(40.0, 80.0, 2)]}
    assert (agentic.title, agentic.unit, bench.title) == ("compare.agentic", "machine", "serve.bench")
    assert bench.lines == {"TokenSpeed": [(80.0, 80.0, 1), (80.0, 320.0, 4)]}


def test_bytes_per_second_are_counted_from_the_shapes():
    row = make("h200.llama-3.1-8b.bf16.decode.b1", 4.0, "ms", machine=GPU)
    bus = make("cpu.decode128.t1", bus_share=0.75, ceiling_gb_s=40.0)
    found = roofline.roofline(Inputs(records=[row, bus, make("h200.other.bf16.decode.b1", 1.0, "ms", machine=GPU)]))
    (reached,) = found.models["llama-3.1-8b.bf16"]
    layer = 4096 * (6144 + 4096 + 3 * 14336)
    weights = 2 * (32 * layer + 128256 * 4096) + 2 * 4096 + 4 * 65 * 4096
    kv = 32 * 2 * 1024 * 2 * (1024 + 64 + 1)
    assert reached.gb_s == pytest.approx((weights + kv) / 4e-3 / 1e9, rel=0.01)
    assert reached.floor_gb_s == pytest.approx(4600, rel=0.01)
    assert found.bars == [("cpu.decode128.t1", 30.0, 40.0)]
    assert list(found.models) == ["llama-3.1-8b.bf16"]


def test_latencies_come_from_every_request_where_they_are_kept():
    found = latency.curves(Inputs(records=served("serve.bench")))
    assert list(found) == ["ttft", "tpot"]
    points = found["ttft"]["serve.bench.c4"]
    assert points[0] == (10.0, 0.0)
    assert points[1:] == [(10.0 + n, (n + 1) / 20) for n in range(20)]
    assert latency.rows(found)[0] == ["serve.bench.c4", "TTFT", "19", "27", "28.8", "29"]


def test_the_rows_of_a_step_add_up_by_role():
    found = steps.ops(STEP)
    assert [(op.name, op.count) for op in found] == [("prepare", 1), ("norm_linear qkv", 2), ("the rest", 2)]
    qkv = found[1]
    assert (qkv.bytes, qkv.floor_us, qkv.us, qkv.gap_us) == (8000, 60.0, 90.0, 5.0)
    assert sum(op.spent_us for op in found) == pytest.approx(STEP.step_us)
    assert steps.rows(STEP)[1] == ["norm_linear qkv", "2", "0.0", "60.0", "90.0", "5.0", "63%"]
    assert steps.rows(STEP)[0] == ["prepare", "1", "", "", "10.0", "0.0", ""]


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A file of records that four commits changed, one of them only another id, one into something else."""
    git(tmp_path, "init", "-q")
    target = Target(at_most=4.0)
    path = tmp_path / "h200.json"
    for value, other in ((5.0, 1.0), (5.0, 2.0), (0.0, 0.0), (3.5, 2.0)):
        if not value:
            path.write_text("broken")
        else:
            path.unlink(missing_ok=True)
            write(path, [make("h200.x.ms", value, "ms", target=target), make("h200.y.ms", other, "ms")])
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "-qm", "x")
    return path


def test_history_holds_the_commits_that_changed_an_id(checkout: Path):
    records = read_inputs([checkout]).records
    (line,) = history.lines([checkout], records)
    assert (line.id, line.unit, line.target) == ("h200.x.ms", "ms", 4.0)
    assert [told.value for told in line.told] == [5.0, 3.5]
    assert [each.id for each in history.lines([checkout], records, ["h200.*"])] == ["h200.x.ms", "h200.y.ms"]
    assert history.lines([checkout.parent.parent / "elsewhere.json"], records) == []


def test_a_report_has_the_pictures_that_it_names(checkout: Path, tmp_path: Path):
    step = tmp_path / "one.json"
    step.write_bytes(msgspec.json.encode(STEP))
    loads = tmp_path / "loads.json"
    write(loads, [*served("serve.bench", 1), *served("serve.bench", 4), make(bus_share=0.5, ceiling_gb_s=40.0)])
    row = make("h200.llama-3.1-8b.bf16.decode.b1", 4.0, "ms", machine=GPU, floor=3.3, share=0.82)
    write(checkout, [row])
    out = tmp_path / "out"
    assert main(["bench", "report", *map(str, (checkout, step, loads)), "--out", str(out)]) == 0
    stems = ["history", "latency", "pareto", "roofline", "roofline-memory", "step-one"]
    pictures = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == {*pictures, "report.html", "report.md"}
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"<?xml" if name.endswith("svg") else b"\x89PNG")
    for page in ("report.md", "report.html"):
        text = (out / page).read_text()
        assert [stem for stem in stems if f"{stem}.svg" not in text] == []
        assert "h200.llama-3.1-8b.bf16.decode.b1" in text


def test_the_same_data_give_the_same_bytes(tmp_path: Path):
    panels = pareto.panels(Inputs(records=served("serve.bench")))
    first, second = (pareto.draw(panels, tmp_path / name / "p") for name in "ab")
    assert [path.name for path in first] == ["p.svg", "p.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.slow
def test_the_picture_of_the_readme_is_that_of_the_records(tmp_path: Path):
    """After a change of the records: docs/benchmarks.md says how it is drawn."""
    root = Path(__file__).resolve().parents[2]
    write_report([root / "benchmarks/results/h200.json"], tmp_path)
    assert "docs/pictures/pareto.svg" in (root / "README.md").read_text()
    assert (tmp_path / "pareto.svg").read_bytes() == (root / "docs/pictures/pareto.svg").read_bytes()


def test_a_report_of_a_load_that_was_printed_as_json(tmp_path: Path):
    told = {"mean": 3.0, "p50": 2.0, "p90": 5.0, "p99": 8.0, "max": 9.0}
    load = {
        "load": "4 at once", "requests": 9, "completed": 9, "errors": {}, "duration_s": 1.0, "requests_per_s": 9.0,
        "input_tokens": 9, "cached_tokens": 0, "output_tokens": 90, "output_tok_s": 90.0, "total_tok_s": 99.0,
        "ttft_ms": told, "tpot_ms": told, "itl_ms": told, "e2e_ms": None, "goodput": None, "arrivals": None,
        "parts": [], "generator": {"cpu_share": 0.1, "late_p99_ms": 0.1, "events": 90},
    }  # fmt: skip
    path = tmp_path / "load.json"
    path.write_text(json.dumps(load))
    inputs = read_inputs([path])
    assert latency.curves(inputs)["itl"] == {"load": [(2.0, 0.5), (5.0, 0.9), (8.0, 0.99), (9.0, 1.0)]}
    assert pareto.panels(inputs)[0].lines == {"TokenSpeed": [(500.0, 90.0, None)]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "not a file of results .known: records"),
        ("[{}]", "not a file of results: Object missing required field"),
        ("nothing", "not a file of results: JSON is malformed"),
        ("[]", "no results in there"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: str, message: str):
    path = tmp_path / "odd.json"
    path.write_text(content)
    with pytest.raises((FormatError, ConfigError), match=rf"odd\.json: {message}"):
        write_report([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_id_twice_and_a_file_that_is_not_there_are_refused(tmp_path: Path):
    for name in ("a.json", "b.json"):
        write(tmp_path / name, [make()])
    with pytest.raises(FormatError, match=r"cpu\.decode128\.t1 is in the files twice"):
        read_inputs([tmp_path / "a.json", tmp_path / "b.json"])
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        read_inputs([tmp_path / "none.json"])
    with pytest.raises(ConfigError, match=r"--history h300\.\*: no id"):
        write_report([tmp_path / "a.json"], tmp_path / "out", ["h300.*"])


def test_no_file_given_and_none_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "report"]) == 1
    assert "no FILE given, and no results in benchmarks/results/" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path / "a.json", served("serve.bench"))
    with pytest.raises(ConfigError, match=r"pip install '\.\[report\]'"):
        write_report([tmp_path / "a.json"], tmp_path / "out")


def test_words_of_a_page_cannot_break_it():
    parts = [Part("A <b>", "x & y", ["p.svg"], ["a|b"], [["<i>", "1|2"]])]
    page = html("T", parts)
    assert "A &lt;b&gt;" in page
    assert "<td>&lt;i&gt;</td>" in page
    assert "| <i> | 1&#124;2 |" in markdown("T", parts)
