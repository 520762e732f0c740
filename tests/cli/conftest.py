"""Running command lines, in this process and in a child."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tokenspeed.cli.main import main
from tokenspeed.observability.ceilings import Ceilings, processor, usable_threads, write_ceilings

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, whatever the parent of the tests ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ceilings:
    """A machine that was measured already, in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Ceilings(processor(), read_gbs=10.0, bf16_tflops=0.5, threads=usable_threads())
    write_ceilings(made)
    return made


@pytest.fixture
def cli(
    demo_path: Path,
    ceilings: Ceilings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Cli:
    """cli(*arguments, stdin=b"") runs `tokenspeed`; the demo model is where it was, all else is the test's own."""
    models = Path(os.environ["XDG_CACHE_HOME"]) / "tokenspeed" / "models"
    models.mkdir()
    for file in (demo_path, demo_path.with_name(demo_path.name + ".verified")):
        (models / file.name).symlink_to(file)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run


@pytest.fixture
def child(cli: Cli) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """child(*arguments) starts `tokenspeed` as a process of its own, with the environment of `cli`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            # A parent that ignores Ctrl-C, as shells do for background jobs, hands that down.
            [sys.executable, "-c", _WITH_CTRL_C, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


_WITH_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tokenspeed.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
