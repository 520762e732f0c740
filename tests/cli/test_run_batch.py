"""`tokenspeed run-batch` as a process: pipes, interruptions, an engine that fails, a second run that does the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.engine.fake_core import FATAL, REFUSED, said

ROOT = Path(__file__).parents[2]
GUARD_S = 60.0
"""Against hanging only."""
SHORT, LONG = 3, 1000
"""Tokens of an answer."""


def prompt_of(number: int) -> list[int]:
    return [20 + number, 30, 40]


def line(number: int, **fields: Any) -> str:
    body = {"prompt": prompt_of(number), "max_tokens": SHORT, "return_token_ids": True} | fields
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n"


class Run:
    """One command, with files in a folder of its own."""

    def __init__(self, folder: Path, mode: str = "ok", step_s: float = 0.0, *flags: str, **streams: Any) -> None:
        files = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.batch_fake", mode, str(step_s), *(flags or files)],
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            **streams,
        )

    def end(self, stdin: bytes | None = None) -> tuple[int, str]:
        """Wait; the exit status and the last line of stderr."""
        self.out, err = self.process.communicate(stdin, timeout=GUARD_S)
        return self.process.returncode, err.decode().rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in.jsonl").write_text("".join(map(line, range(30))))
    return tmp_path


def results(folder: Path) -> dict[str, Any]:
    """By custom_id; no line comes twice, and none is torn."""
    text = (folder / "out.jsonl").read_text() if (folder / "out.jsonl").exists() else ""
    made = [json.loads(each) for each in text.splitlines()]
    found = {each["custom_id"]: each["response"] for each in made}
    assert len(found) == len(made)
    return found


def wait_for_some(folder: Path, count: int) -> None:
    end = time.monotonic() + GUARD_S
    while not (folder / "out.jsonl").exists() or (folder / "out.jsonl").read_bytes().count(b"\n") < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def check_all(folder: Path, long: tuple[int, ...] = ()) -> None:
    found = results(folder)
    assert len(found) == 30
    for number in range(30):
        (choice,) = found[f"c{number}"]["body"]["choices"]
        assert choice["token_ids"] == said(prompt_of(number), 0, LONG if number in long else SHORT)


def test_pipes() -> None:
    run = Run(Path(), "ok", 0.0, "-i", "-", "-o", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    status, told = run.end(f"{line(1)}\noops\n{line(2, stream=True)}{line(3)}".encode().rstrip())
    assert (status, told) == (0, "4 lines answered, 0 of them before; 2 with an error")
    made = [json.loads(text) for text in run.out.splitlines()]
    assert {each["custom_id"]: each["response"]["status_code"] for each in made} == {
        "c1": 200,
        None: 400,
        "c2": 400,
        "c3": 200,
    }


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGTERM))],
)
def test_an_interrupted_run_is_gone_on_with(folder: Path, number: signal.Signals) -> None:
    """Two lines of a hundred seconds are under way by then."""
    lines = [line(each, max_tokens=LONG if each in (10, 11) else SHORT) for each in range(30)]
    (folder / "in.jsonl").write_text("".join(lines))
    flags = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--max-in-flight", "2"]
    run = Run(folder, "ok", 0.1, *flags)
    wait_for_some(folder, 10)
    run.process.send_signal(number)
    status, told = run.end()
    some = results(folder)
    assert len(some) == 10
    if number == signal.SIGKILL:
        assert status == -number
    else:
        assert status == 130
        assert told == "10 lines answered, 0 of them before; 0 with an error; the same command goes on from here"
    assert Run(folder).end() == (0, "30 lines answered, 10 of them before; 0 with an error")
    assert {name: results(folder)[name] for name in some} == some
    check_all(folder, long=(10, 11))


def test_an_interrupt_while_a_pipe_has_nothing_more(folder: Path) -> None:
    run = Run(folder, "ok", 0.0, "-i", "-", "-o", str(folder / "out.jsonl"), stdin=subprocess.PIPE)
    assert run.process.stdin is not None
    run.process.stdin.write(line(1).encode())
    run.process.stdin.flush()
    wait_for_some(folder, 1)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(GUARD_S) == 130
    assert run.process.stderr is not None
    assert b"Fatal" not in run.process.stderr.read()
    run.end()
    assert list(results(folder)) == ["c1"]


@pytest.mark.parametrize(
    "mode, complaint",
    [("raise", "the bolt broke"), pytest.param("exit", "the engine process ended", marks=pytest.mark.slow)],
)
def test_an_engine_that_fails(folder: Path, mode: str, complaint: str) -> None:
    lines = [line(number) for number in range(30)]
    (folder / "in.jsonl").write_text("".join([*lines[:12], line(12, prompt=[FATAL]), *lines[13:]]))
    run = Run(
        folder, mode, 0.0, "-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--max-in-flight", "1"
    )
    status, told = run.end()
    assert status == 1
    assert told.startswith("tokenspeed: error: ")
    assert complaint in told
    assert len(results(folder)) == 12
    (folder / "in.jsonl").write_text("".join(lines))
    assert Run(folder).end()[0] == 0
    check_all(folder)


def test_what_the_engine_refuses_is_the_lines_own_error(folder: Path) -> None:
    (folder / "in.jsonl").write_text(line(0) + line(1, prompt=[REFUSED]) + line(2, prompt=[300]))
    assert Run(folder).end() == (0, "3 lines answered, 0 of them before; 2 with an error")
    found = results(folder)
    assert [found[f"c{number}"]["status_code"] for number in range(3)] == [200, 400, 400]
    assert "13 brings bad luck" in found["c1"]["body"]["error"]["message"]
    assert "300" in found["c2"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["-i", "{here}/none", "-o", "-"], r"none: cannot be read (No such file or directory)"),
        (["-i", "{here}/in.jsonl", "-o", "{here}/in.jsonl"], "are the same file"),
        (["-i", "{here}/in.jsonl", "-o", "{here}/other"], "other: line 1 is no result of a batch"),
        (["-i", "{here}/in.jsonl", "-o", "-", "--max-in-flight", "0"], "--max-in-flight must be at least 1, got 0"),
        (["-i", "{here}/in.jsonl", "-o", "-", "--block-size", "0"], "--block-size must be at least 1"),
    ],
)
def test_what_is_refused(cli: Cli, folder: Path, flags: list[str], complaint: str) -> None:
    (folder / "other").write_text("notes\n")
    before = (folder / "in.jsonl").read_bytes()
    ran = cli("run-batch", *(flag.format(here=folder) for flag in flags))
    assert (ran.status, ran.out) == (1, "")
    assert complaint in ran.err
    assert ran.err.count("\n") == 1
    assert (folder / "in.jsonl").read_bytes() == before
    assert (folder / "other").read_text() == "notes\n"


@pytest.mark.slow
def test_the_documented_commands(demo_path: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "offline-batches.md").read_text()
    shown = [part[4:] for part in text.split("answers a file")[0].splitlines()[2:]]
    command = f'tokenspeed() {{ "{sys.executable}" -m tokenspeed.cli.main "$@"; }}\n' + "\n".join(shown)
    here: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    subprocess.run(["bash", "-ec", command], check=True, **here)
    found = {each["custom_id"]: each["response"] for each in map(json.loads, (tmp_path / "out.jsonl").open())}
    assert {name: each["status_code"] for name, each in found.items()} == {"colors": 200, "talk": 200}
    assert found["colors"]["body"]["choices"][0]["text"].startswith(" red, blue")
    code = text.split("```python\n")[1].split("```")[0]
    made = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, **here)
    assert made.stdout.strip()
    assert not any(char.isdigit() for char in made.stdout)
