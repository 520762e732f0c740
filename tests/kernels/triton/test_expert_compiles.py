"""Routers and experts compile, and their assembly holds what makes them fast. In child processes, no interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton.triton_versions import INSTALLED, ROOT, VERSIONS, child_environment, paths_of

DECODE = {
    "router_kernel", "gate_up_kernel", "down_kernel", "_list_kernel", "grouped_kernel", "combine_kernel", "rows_kernel",
    "packed_experts_kernel", "packed_choice_kernel",
}  # fmt: skip
NAMES = DECODE - {"rows_kernel"} | {"route_kernel", "_count_kernel"}
PRODUCTS = ("grouped_kernel", "packed_experts_kernel", "packed_choice_kernel")


def compiled(target: str, which: str, cache: Path, version: str = INSTALLED) -> list[dict[str, Any]]:
    environment = child_environment(version) | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.triton.expert_launches", target, which]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = json.loads(done.stdout)
    return kernels


def test_one_of_each_for_hopper(tmp_path: Path) -> None:
    kernels = compiled("sm_90", "few", tmp_path)
    assert {kernel["name"] for kernel in kernels} == DECODE
    for kernel in kernels:
        if kernel["name"] == "grouped_kernel":
            assert kernel["wgmma.mma_async"] > 0, kernel
        if kernel["name"] == "down_kernel":
            # It knows its first expert before the wait, and asks for that one's weights.
            assert kernel["evict_first loads before wait"] > 0, kernel
        if kernel["name"].startswith("packed_"):
            assert kernel["mma.sync"] > 0, kernel
            # Words and rows of x are read from shared memory as products take them, and widened in registers.
            assert kernel["ldmatrix"] in (6, 8), kernel
            assert (kernel["words side by side"], kernel["words apart"]) == (1, 0), kernel
        if kernel["name"] == "router_kernel":
            assert kernel["other loads before wait"] > 0, kernel
        assert kernel["griddepcontrol.wait"] == kernel["griddepcontrol.launch_dependents"] == 1, kernel
    sums = [kernel for kernel in kernels if kernel["name"] == "combine_kernel" and kernel["x"] == "*fp32"]
    assert [kernel["starts the next before wait"] for kernel in sums] == [True]
    # So does a block of down.
    for name in ("grouped_kernel", "packed_experts_kernel", "packed_choice_kernel"):
        assert any(kernel["prefetch.global.L2"] > 0 for kernel in kernels if kernel["name"] == name)


WITHOUT_PRODUCTS = {("sm_100", "3.6.0"): {"packed_experts_kernel"}}
"""Where the compiler leaves a trap in the place of some tile of a kernel (here of 128 choices, whose operands are more
than tensor memory holds; Triton 3.9.0 copes)."""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
def test_every_kernel_for_every_target(target: str, version: str, tmp_path: Path) -> None:
    kernels = compiled(target, paths_of(target), tmp_path, version)
    assert {kernel["name"] for kernel in kernels} >= NAMES
    assert not any(kernel["words apart"] for kernel in kernels)
    if target.startswith("sm"):
        products = [kernel for kernel in kernels if kernel["name"] in PRODUCTS and kernel["x"] != "*fp32"]
        units = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
        without = {each["name"] for each in products if not any(each[unit] for unit in units)}
        assert without == WITHOUT_PRODUCTS.get((target, version), set())
