from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "size_report.py"


def report(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--root", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def function(lines: int, indent: str = "") -> str:
    return f"{indent}def long_one():\n" + f"{indent}    pass\n" * (lines - 1)


@pytest.mark.parametrize("suffix", ["py", "cpp", "hpp", "cu", "cuh"])
@pytest.mark.parametrize("top", ["tokenspeed/ops", "tests/ops", "tools"])
def test_a_file_may_have_500_lines_and_no_more(tmp_path, suffix, top):
    put(tmp_path, f"{top}/big.{suffix}", "\n" * 500)
    assert report(tmp_path).returncode == 0
    put(tmp_path, f"{top}/big.{suffix}", "\n" * 501)
    done = report(tmp_path)
    assert done.returncode == 1
    assert f"{top}/big.{suffix}: 501 lines, limit 500" in done.stderr


@pytest.mark.parametrize("head, indent", [("", ""), ("class A:\n", "    "), ("if True:\n", "    ")])
def test_a_function_may_have_60_lines_and_no_more(tmp_path, head, indent):
    put(tmp_path, "tokenspeed/ops/a.py", head + function(60, indent))
    assert report(tmp_path).returncode == 0
    put(tmp_path, "tokenspeed/ops/a.py", head + function(61, indent).replace("def", "async def"))
    done = report(tmp_path, "--quiet")
    assert done.returncode == 1
    assert done.stdout == ""
    line = 2 if head else 1
    assert done.stderr == f"too long: tokenspeed/ops/a.py:{line} long_one: 61 lines, limit 60\n"


def test_functions_of_tests_and_files_outside_the_source_are_free(tmp_path):
    put(tmp_path, "tests/test_a.py", function(400))
    put(tmp_path, ".venv/big.py", "\n" * 9000)
    put(tmp_path, "tokenspeed/data.json", "\n" * 9000)
    assert report(tmp_path).returncode == 0


def test_rooms_are_summed_and_the_largest_come_first(tmp_path):
    put(tmp_path, "tokenspeed/__init__.py", "\n" * 3)
    put(tmp_path, "tokenspeed/kernels/a.py", function(7))
    put(tmp_path, "tokenspeed/kernels/cpu/b.cpp", "\n" * 11)
    put(tmp_path, "tokenspeed/ops/c.py", function(13) + function(9))
    lines = [line.split() for line in report(tmp_path, "--top", "2").stdout.splitlines()]
    assert ["3", "tokenspeed"] in lines
    assert ["18", "tokenspeed/kernels"] in lines
    assert ["22", "tokenspeed/ops"] in lines
    files = lines.index(["largest", "files", "(limit", "500)"])
    assert lines[files + 1 : files + 3] == [["22", "tokenspeed/ops/c.py"], ["11", "tokenspeed/kernels/cpu/b.cpp"]]
    functions = lines[files + 4 :]
    assert functions == [["13", "tokenspeed/ops/c.py:1", "long_one"], ["9", "tokenspeed/ops/c.py:14", "long_one"]]
