from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tokenspeed.bench.launch import busy_core, run_program
from tokenspeed.contracts.errors import ConfigError


@pytest.mark.parametrize("megabytes", [61, 137])
def test_the_peak_is_the_programs_own_however_large_its_starter_is(megabytes):
    ballast = b"x" * 300_000_000
    code = f"import sys; data = b'y' * {megabytes}_000_000; print(len(data)); print('note', file=sys.stderr)"
    done = run_program([sys.executable, "-I", "-S", "-c", code])
    del ballast
    assert (done.stdout, done.stderr) == (f"{megabytes}000000\n", "note\n")
    assert megabytes < done.peak_mb < megabytes + 40


def test_a_program_that_fails_is_named_with_what_it_said():
    with pytest.raises(ConfigError, match=r"python.* failed \(3\): no such thing"):
        run_program([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"])


def test_a_program_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"no-such-program could not be run"):
        run_program([Path("no-such-program")])


def test_a_busy_core_is_one_process_on_one_core_and_gone_afterwards():
    mine = os.sched_getaffinity(0)
    before = children()
    with busy_core() as core:
        (spinner,) = children() - before
        assert core in mine
        assert Path(f"/proc/{spinner}/status").read_text().split("Cpus_allowed_list:\t")[1].split("\n")[0] == str(core)
        used = cpu_ticks(spinner)
        deadline = time.monotonic() + 30
        while cpu_ticks(spinner) < used + 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cpu_ticks(spinner) >= used + 5
    assert children() == before


def test_one_core_alone_cannot_be_kept_busy(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with pytest.raises(ConfigError, match="needs two"), busy_core():
        pass


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
