from __future__ import annotations

import datetime
from types import SimpleNamespace

import pytest

from tokenspeed.bench import cpu, record, table
from tokenspeed.contracts.errors import ConfigError


def make(id: str) -> record.Record:
    machine = record.Machine(cpu="Test CPU", cores=2, memory_gib=8.0)
    return record.Record(
        id=id,
        value=1.0,
        unit="s",
        command="make bench-cpu",
        commit=None,
        versions={},
        machine=machine,
        date=datetime.date(2026, 11, 21),
    )


@pytest.fixture
def engines(monkeypatch):
    """Engines that were made: their settings, and the rows that each ran."""
    made: list[dict] = []

    class FakeLLM:
        def __init__(self, **settings):
            self.core = SimpleNamespace(backend=SimpleNamespace(name="cpu", fallback_ops=[]))
            self.settings, self.rows, self.open = settings, [], True
            assert not any(llm.open for llm in made), "one at a time: they would share the cores"
            made.append(self)

        def close(self):
            self.open = False

    def measure(row, llm, peer, pairs):
        llm.rows.append(row.id)
        return [make(row.id)]

    monkeypatch.setattr(cpu, "LLM", FakeLLM)
    monkeypatch.setattr(cpu, "measure", measure)
    monkeypatch.setattr(cpu, "MEASURES", {name: lambda peer, pairs, name=name: make(name) for name in cpu.MEASURES})
    monkeypatch.setattr(cpu.llama_cpp, "build", lambda: None)
    monkeypatch.setattr(cpu, "demo_model_path", lambda: None)
    return made


@pytest.mark.parametrize(
    "patterns, ids",
    [
        (["cpu.decode128.t?"], ["cpu.decode128.t1", "cpu.decode128.t2"]),
        (["cpu.rss", "cpu.batch8*"], ["cpu.batch8.t1", "cpu.batch8.t2", "cpu.rss"]),
    ],
)
def test_rows_are_chosen_by_pattern(patterns, ids):
    assert cpu.select(patterns) == ids


def test_a_pattern_without_a_row_is_refused():
    with pytest.raises(ConfigError, match=r"decode129.*cpu\.decode128\.t1.*cpu\.busy"):
        cpu.select(["cpu.rss", "cpu.decode129"])


def test_every_row_runs_on_an_engine_with_its_head_and_threads(engines, tmp_path):
    cpu.main(["--out", str(tmp_path / "cpu.json"), "--pairs", "1"])
    assert [(llm.settings["threads"], llm.settings["lm_head"]) for llm in engines] == [
        (1, "full"),
        (1, "screened"),
        (2, "full"),
        (2, "screened"),
    ]
    for llm in engines:
        threads, screened = llm.settings["threads"], llm.settings["lm_head"] == "screened"
        assert all(f".t{threads}" in row and row.endswith(".screened") == screened for row in llm.rows)
    written = [each.id for each in record.read(tmp_path / "cpu.json")]
    assert sorted(cpu.select(["*"])) == written
    assert sum(len(llm.rows) for llm in engines) == len(written) - len(cpu.MEASURES)


def test_the_page_follows_the_published_records_alone(engines, monkeypatch, tmp_path):
    pages: list[list[str]] = []
    monkeypatch.setattr(table, "main", pages.append)
    cpu.main(["--out", str(tmp_path / "other.json"), "--only", "cpu.rss"])
    assert pages == []
    monkeypatch.setattr(cpu, "RESULTS", tmp_path / "cpu.json")
    cpu.main(["--only", "cpu.rss"])
    assert pages == [[]]
    assert [each.id for each in record.read(tmp_path / "cpu.json")] == ["cpu.rss"]


@pytest.mark.parametrize("name, ops", [("ref", []), ("cpu", ["attention"])])
def test_slow_paths_are_not_measured(name, ops):
    llm = SimpleNamespace(core=SimpleNamespace(backend=SimpleNamespace(name=name, fallback_ops=ops)))
    with pytest.raises(ConfigError, match=f"the {name} backend .*{ops[0] if ops else 'all ops'}"):
        cpu._require_kernels(llm)
