"""The attention kernels compile for every GPU they are meant for, with the instructions that make them fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton.triton_versions import INSTALLED, VERSIONS, child_environment

HERE = Path(__file__).resolve().parent
SHARED = {"cuda:80": 163, "cuda:90": 227, "cuda:100": 227, "hip:gfx942": 64, "hip:gfx950": 160}
"""KiB of shared memory that one program may have."""
FAST = {"cuda:80": "mma.sync", "cuda:90": "wgmma", "cuda:100": "tcgen05", "hip:gfx942": "mfma", "hip:gfx950": "mfma"}
"""What a prefill in bf16 multiplies with."""


def compiled(target: str, *cases: str, version: str = INSTALLED) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "compile_attention.py"), target, "--", *cases]
    done = subprocess.run(command, env=child_environment(version), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["kernels"]
    assert all(facts["shared"] <= SHARED[target] * 1024 for facts in found.values()), found
    return {name.removeprefix(f"{target} "): facts["has"] for name, facts in found.items()}


def test_kernels_compile_for_hopper():
    has = compiled(
        "cuda:90", "decode 8b pdl", "prefill 8b", "write 8b pdl", "items", "invariant 8b pdl", "invariant 8b"
    )
    ahead = ("decode 8b pdl _decode", "decode 8b pdl _combine", "write 8b pdl _rope_write")
    for kernel in (*ahead, "invariant 8b pdl _attend", "invariant 8b pdl _merge_spans"):
        assert {"griddepcontrol.wait", "griddepcontrol.launch"} <= set(has[kernel]), kernel
    assert {"mma.sync", "cp.async"} <= set(has["decode 8b pdl _decode"])
    for kernel in ("prefill 8b _prefill", "invariant 8b _attend", "invariant 8b pdl _attend"):
        assert {"wgmma", "cp.async"} <= set(has[kernel]), kernel
    # An approximate cosine is off by far more than a rounding at the angles of long contexts.
    assert "cos.approx" not in has["write 8b pdl _rope_write"]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", SHARED)
def test_every_variant_compiles_for_every_target(target, version):
    has = compiled(target, version=version)
    pdl = {"griddepcontrol.wait", "griddepcontrol.launch"}
    assert all(("pdl" in name) == (pdl <= set(words)) for name, words in has.items())
    half = [words for name, words in has.items() if name.endswith(("_prefill", "_attend")) and "float32" not in name]
    assert half
    assert all(FAST[target] in words for words in half)
