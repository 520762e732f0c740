"""What a newcomer does first, from a clone to a report with plots, in a folder and a cache of its own."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600
"""What is promised for two cores."""
STEPS = ("clone", "make demo", "tokenspeed serve", "curl", "a client in Python", "bench serve", "bench report")


@pytest.mark.slow
def test_the_first_ten_minutes(tmp_path: Path) -> None:
    foreign = ("MAKE", "MFLAGS", "PYTHON", "OMP_", "MKL_", "PYTEST", "TRITON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    done = subprocess.run(
        [str(ROOT / "tools" / "newcomer.sh"), str(tmp_path / "clone"), str(ROOT)],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^== (.*) \(\d+ s\)$", done.stdout, re.MULTILINE)[: len(STEPS)] == list(STEPS)
    for found in ("red, blue", '"finish_reason"', "TTFT", ".svg", ".png"):
        assert found in done.stdout, found
