from __future__ import annotations

import datetime
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tokenspeed
from tokenspeed.bench import record, stats
from tokenspeed.contracts.errors import ConfigError, FormatError

MACHINE = record.Machine(cpu="Test CPU", cores=3, memory_gib=7.5)


def make(id: str = "cpu.decode128.t1", value: float = 101.25, unit: str = "tok/s", **fields) -> record.Record:
    base: dict[str, Any] = {
        "command": "make bench-cpu",
        "commit": "0" * 40,
        "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "machine": MACHINE,
        "date": datetime.date(2026, 11, 21),
    }
    return record.Record(id=id, value=value, unit=unit, **(base | fields))


def random_record(rng: random.Random, id: str) -> record.Record:
    n = rng.randint(1, 9)
    ours = [rng.uniform(1, 99) for _ in range(n)]
    interval = stats.median_interval(ours)
    share = rng.random()
    return make(
        id,
        rng.uniform(1, 99),
        rng.choice(sorted(record.UNITS)),
        target=record.Target(of="ratio", at_least=rng.random()),
        peer="peer 1.0",
        ratio=interval,
        weight_share=share,
        ceiling_gb_s=37.9,
        samples={"a": ours},
    )


@pytest.mark.parametrize("seed", [21, 22, 23])
def test_merging_keeps_replaces_and_sorts(tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "results" / "cpu.json"
    ids = [f"cpu.row{i}.t{i % 3}" for i in range(13)]
    old = {id: random_record(rng, id) for id in rng.sample(ids, 9)}
    new = {id: random_record(rng, id) for id in rng.sample(ids, 7)}
    record.write(path, list(old.values()))
    record.write(path, list(new.values()))
    merged = old | new
    assert record.read(path) == [merged[id] for id in sorted(merged)]
    assert os.listdir(path.parent) == ["cpu.json"]


@pytest.mark.parametrize("seed", [31, 32])
def test_the_file_does_not_depend_on_the_order_of_writing(tmp_path, seed):
    rng = random.Random(seed)
    records = [random_record(rng, f"h200.model-{i}.bf16") for i in range(7)]
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    record.write(one, records)
    for item in rng.sample(records, len(records)):
        shuffled = dict(rng.sample(sorted(item.versions.items()), len(item.versions)))
        record.write(other, [msgspec.structs.replace(item, versions=shuffled)])
    assert one.read_bytes() == other.read_bytes()
    record.write(one, records[:3])
    assert one.read_bytes() == other.read_bytes()
    text = one.read_text()
    assert text.endswith("]\n")
    assert len(text.splitlines()) > 20 * len(records)


def test_unset_fields_are_left_out_and_read_back_as_none(tmp_path):
    record.write(tmp_path / "a.json", [make()])
    (fields,) = json.loads((tmp_path / "a.json").read_text())
    assert set(fields) == {"id", "value", "unit", "command", "commit", "versions", "machine", "date"}
    assert fields["date"] == "2026-11-21"
    (back,) = record.read(tmp_path / "a.json")
    assert back.peer is None
    assert back.ratio is None


@pytest.mark.parametrize(
    "id", ["cpu.decode128.t1.screened", "h200.llama-3.2-1b.bf16.decode.b8.ctx8k", "host.hash50k.ms"]
)
def test_ids_in_use_are_accepted(id):
    assert make(id).id == id


@pytest.mark.parametrize(
    "id", ["", "cpu", "cpu.", ".t1", "Cpu.t1", "cpu..t1", "cpu.t 1", "cpu/t1", "1cpu.t1", "cpu.t1\n"]
)
def test_malformed_ids_are_refused(id):
    with pytest.raises(ConfigError, match="id must look like"):
        make(id)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"unit": "tokens per second"}, "unknown unit"),
        ({"value": float("nan")}, "value is nan"),
        ({"floor": float("inf")}, "floor is inf"),
        ({"peer_value": 3.0}, "need peer"),
        ({"ratio": stats.median_interval([1.0, 2.0])}, "need peer"),
        ({"weight_share": 0.5}, "ceiling_gb_s"),
        ({"bus_share": 0.5}, "ceiling_gb_s"),
        ({"runs": stats.summarise([101.0, 103.0])}, "lower quartile"),
        ({"command": " "}, "command is empty"),
        ({"samples": {"a": [1.0, float("inf")]}}, "samples 'a'"),
    ],
)
def test_contradictory_records_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=re.escape("cpu.decode128.t1") + ".*" + message):
        make(**fields)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1.0, "at_most": 2.0}])
def test_a_target_has_exactly_one_bound(bounds):
    with pytest.raises(ConfigError, match="exactly one"):
        record.Target(**bounds)


def test_met_looks_at_the_field_the_target_names():
    ratio = stats.median_interval([1.5, 1.7, 1.6])
    with_peer: dict[str, Any] = {"peer": "llama.cpp", "ratio": ratio}
    assert make().met() is None
    assert make(target=record.Target(at_least=101.25)).met() is True
    assert make(target=record.Target(at_most=101.2)).met() is False
    assert make(target=record.Target(of="ratio", at_least=1.6), **with_peer).met() is True
    assert make(target=record.Target(of="ratio", at_least=1.61), **with_peer).met() is False
    assert make(target=record.Target(of="share", at_least=0.7)).met() is None
    shares: dict[str, Any] = {"bus_share": 0.77, "weight_share": 0.9, "ceiling_gb_s": 38.0}
    assert make(target=record.Target(of="bus_share", at_least=0.78), **shares).met() is False


@pytest.mark.parametrize("count, expected", [(stats.GATE_RUNS - 1, None), (stats.GATE_RUNS, True)])
def test_an_absolute_target_needs_enough_runs_and_their_lower_quartile(tmp_path, count, expected):
    runs = stats.summarise([3.9] * (count // 2) + [9.0] * (count - count // 2))
    entry = make("cpu.first_token", runs.lower_quartile, "s", runs=runs, target=record.Target(at_most=4))
    assert entry.met() is expected
    record.write(tmp_path / "a.json", [entry])
    assert record.read(tmp_path / "a.json") == [entry]
    slow = stats.summarise([3.9, *[4.1] * count])
    assert make(value=slow.lower_quartile, runs=slow, target=record.Target(at_most=4)).met() is False
    ratio = {"peer": "p", "ratio": stats.median_interval([2.0]), "target": record.Target(of="ratio", at_least=1.0)}
    assert make(value=runs.lower_quartile, runs=runs, **ratio).met() is True


def test_an_id_twice_in_one_call_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match="twice"):
        record.write(tmp_path / "a.json", [make(), make(value=1.0)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{}", "[{}]", '[{"id": 3}]', "[1, 2", None])
def test_a_broken_file_is_an_error_that_names_it_and_stays_as_it_was(tmp_path, content):
    path = tmp_path / "broken.json"
    if content is None:  # a well-formed record but for its unit
        content = msgspec.json.encode([make()]).decode().replace("tok/s", "furlong")
    path.write_text(content)
    with pytest.raises(FormatError, match=re.escape(str(path))):
        record.write(path, [make()])
    assert path.read_text() == content


def test_unknown_fields_of_a_file_are_refused(tmp_path):
    record.write(tmp_path / "a.json", [make()])
    fields = json.loads((tmp_path / "a.json").read_text())
    fields[0]["surplus"] = 1
    (tmp_path / "a.json").write_text(json.dumps(fields))
    with pytest.raises(FormatError, match="surplus"):
        record.read(tmp_path / "a.json")


def test_machine_names_the_hardware_and_nothing_private():
    machine = record.machine()
    assert machine.cpu
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.memory_gib == pytest.approx(
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, abs=0.06
    )
    text = msgspec.json.encode(machine).decode()
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert "/" not in machine.cpu


def test_a_run_in_a_fresh_process_records_versions_without_importing_torch():
    code = (
        "import json, sys; from tokenspeed.bench import record\n"
        "here = record.surroundings('make bench-cpu')\n"
        "print(json.dumps([here['versions'], here['machine'].gpu, here['command'], 'torch' in sys.modules]))"
    )
    root = Path(tokenspeed.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    versions, gpu, command, torch_imported = json.loads(done.stdout)
    assert versions["python"] == platform.python_version()
    assert versions["tokenspeed"] == tokenspeed.__version__
    assert versions["torch"].split(".")[0] == "2"
    assert "numpy" in versions
    assert (gpu, command, torch_imported) == (None, "make bench-cpu", False)


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    command = ["git", *identity, "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_of_clean_dirty_foreign_and_missing_checkouts(tmp_path):
    assert record.commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert record.commit(tmp_path) is None
    package, results = tmp_path / "package", tmp_path / "benchmarks" / "results"
    for directory in (package, results):
        directory.mkdir(parents=True)
        (directory / "file").write_text("one\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert record.commit(package) == revision

    (results / "file").write_text("a new result\n")
    (tmp_path / "untracked").write_text("")
    assert record.commit(package) == revision
    (tmp_path / "package" / "file").write_text("two\n")
    assert record.commit(package) == f"{revision}-dirty"
    installed = tmp_path / "untracked-environment"
    installed.mkdir()
    assert record.commit(installed) is None
