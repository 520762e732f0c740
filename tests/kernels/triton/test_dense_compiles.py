"""The dense kernels compile, and their assembly holds what makes them fast. In child processes, without interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton.triton_versions import INSTALLED, ROOT, VERSIONS, child_environment, paths_of

PRODUCTS = {"skinny_kernel", "product_kernel", "packed_kernel"}
"""What multiplies on tensor cores."""
NAMES = PRODUCTS | {
    "gemv_kernel", "add_parts_kernel", "rows_kernel", "act_kernel", "embed_kernel", "dequantize_kernel"
}  # fmt: skip


def compiled(target: str, which: str, cache: Path, version: str = INSTALLED) -> list[dict[str, Any]]:
    environment = child_environment(version) | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.triton.dense_launches", target, which]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = json.loads(done.stdout)
    return kernels


def test_one_of_each_for_hopper(tmp_path: Path) -> None:
    kernels = compiled("sm_90", "few", tmp_path)
    assert {kernel["name"] for kernel in kernels} == NAMES
    for kernel in kernels:
        assert kernel["griddepcontrol.wait"] == 1, kernel
        assert kernel["griddepcontrol.launch_dependents"] == 1, kernel
        if kernel["name"] in PRODUCTS:
            assert kernel["wgmma.mma_async"] > 0, kernel
        if kernel["name"] == "gemv_kernel":
            # Weights are asked for before the wait, and do not push activations out of the caches.
            assert kernel["evict_first loads before wait"] > 0, kernel
            assert kernel["other loads before wait"] == 0, kernel
    # Tiles that measured better so ask for weights before the wait.
    assert any(kernel["prefetch.global.L2"] > 0 for kernel in kernels if kernel["name"] == "skinny_kernel")
    assert all(kernel["prefetch.global.L2"] > 0 for kernel in kernels if kernel["name"] == "packed_kernel")


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
def test_every_kernel_for_every_target(target: str, version: str, tmp_path: Path) -> None:
    kernels = compiled(target, paths_of(target), tmp_path, version)
    assert {kernel["name"] for kernel in kernels} == NAMES
    waits = sum(kernel["griddepcontrol.wait"] for kernel in kernels)
    assert waits == (len(kernels) if target in ("sm_90", "sm_100") else 0)
    if target.startswith("sm"):
        # float32 products are exact, so not on tensor cores.
        products = [kernel for kernel in kernels if kernel["name"] in PRODUCTS and kernel["x"] != "*fp32"]
        assert {kernel["name"] for kernel in products} == PRODUCTS
        assert len(products) >= (15 if len(kernels) > 50 else 3)
        assert all(k["wgmma.mma_async"] + k["mma.sync"] + k["tcgen05.mma"] > 0 for k in products)
