"""What the GPU has neither a kernel for nor a reference that a graph can hold is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity_tools import CASES, load, make_safetensors
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.runner.gpu import backend
from tokenspeed.runner.gpu.backend import GpuBackend


def no_kernels(registry: Any) -> None:
    """Nothing but references."""


def test_experts_without_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_safetensors(CASES["mixtral"], "F32", tmp_path).path)
    monkeypatch.setattr(backend, "place_weights", None)
    with pytest.raises(UnsupportedError, match="op experts has no implementation"):
        GpuBackend(model, register=no_kernels)


def test_other_ops_go_through_their_references(tmp_path: Path) -> None:
    model = load(make_safetensors(CASES["llama"], "F32", tmp_path).path)
    assert {"linear", "attention"} <= set(GpuBackend(model, register=no_kernels).fallback_ops)
