"""The sampling kernels compile for GPUs that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton.triton_versions import INSTALLED, VERSIONS, child_environment

SCRIPT = Path(__file__).with_name("sampling_targets.py")
KERNELS = 10
AHEAD = {"_peaks": 2, "_choose": 9, "_finish": 5}
"""Kernels that read the step's inputs before they wait, and how many loads that takes."""


def compiled(*arguments: str, version: str = INSTALLED) -> list[dict[str, Any]]:
    """What a process whose kernels are not interpreted says of each kernel and target."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=child_environment(version),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]]) -> None:
    for entry in found:
        assert entry["binary"], entry
        assert entry["waits"] == entry["pdl"], entry
        assert not entry["fused"], entry


def test_kernels_compile_for_hopper_and_launch_dependently() -> None:
    found = compiled("sm_90")
    check(found)
    assert len(found) == KERNELS
    launched = [entry for entry in found if entry["pdl"]]
    assert len(launched) == KERNELS - 1
    assert {entry["kernel"]: n for entry in launched if (n := entry["loads before wait"])} == AHEAD


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, version", [("fp32", INSTALLED), ("fp16", INSTALLED), *(("bf16", version) for version in VERSIONS)]
)
def test_kernels_compile_for_every_target(dtype: str, version: str) -> None:
    found = compiled("sm_80", "sm_90", "sm_100", "gfx942", "gfx950", "--dtype", dtype, version=version)
    check(found)
    assert len(found) == 5 * KERNELS
