"""The experts' own source, run thread by thread on the host, against float64. On a GPU: `python -m
tokenspeed.bench.gpu.experts --check`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.emulated import emulate
from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import ExpertCase, exact, poisoned, worst_error
from tokenspeed.kernels.cuda import experts
from tokenspeed.kernels.cuda.experts import stream_experts

SMALL = ExpertCase(6, 3, 256, 128)
BOUND, WIDE_BOUND = 0.012, 0.08
"""Of a row's norm. By e4m3 weights float64 rounds x, the kernel does not."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For compiled kernels."""
    return tmp_path_factory.mktemp("emulated")


@pytest.mark.parametrize(("tokens", "fmt", "act"), [(1, "plain", "silu"), (1, "channel", "gelu_tanh"), (5, "plain", "silu"),
                                                    (8, "channel", "silu"), (2, "plain", "gelu_tanh")])  # fmt: skip
def test_tokens(tokens: int, fmt: str, act: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, folder, experts)
    g = torch.Generator().manual_seed(SEED + tokens)
    case = replace(SMALL, fmt=fmt, act=act)
    given, asked = case.random(g), case.choices(tokens, g, padding=tokens // 5)
    wanted = exact(*asked, given)
    with poisoned():
        y = stream_experts(*asked, given)
    assert y is not None
    print(worst_error(y, wanted))
    assert worst_error(y, wanted) < (BOUND if fmt == "plain" else WIDE_BOUND)
