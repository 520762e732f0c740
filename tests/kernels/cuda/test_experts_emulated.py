"""The experts' own source, run thread by thread on the host, against float64: tokens that share experts and tokens of
padding, formats, activations. On a GPU: `python -m tokenspeed.bench.gpu.experts --check`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.emulated import PROCESSORS, EmulatedKernel, on_host
from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import ExpertCase, exact, poisoned, worst_error
from tokenspeed.kernels.cuda import experts
from tokenspeed.kernels.cuda.experts import Variant, stream_experts

SMALL = ExpertCase(5, 3, 256, 128)
CASES = [(1, "plain", "silu"), (5, "channel", "gelu_tanh")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For compiled kernels."""
    return tmp_path_factory.mktemp("emulated")


def emulate(patch: pytest.MonkeyPatch, folder: Path, warps: int) -> None:
    """Have the kernels run on the host in this test, by so many warps: each of their threads is one of the host."""

    def kernel(found: Variant, device: int) -> EmulatedKernel:
        return EmulatedKernel(folder, "experts", found.defines(), "run_experts.cpp")

    on_host(patch, experts, kernel)
    patch.setattr(experts, "processors", lambda device: PROCESSORS)
    patch.setattr(experts, "WARPS", (warps,))
    for name in ("NARROW_UP", "NARROW_DOWN"):
        patch.setattr(experts, name, ((warps, 256), (warps, 128)))


def right(case: ExpertCase, tokens: int, padding: int) -> None:
    g = torch.Generator().manual_seed(SEED + tokens)
    given, asked = case.random(g), case.choices(tokens, g, padding)
    with poisoned():
        y = stream_experts(*asked, given)
    assert y is not None
    assert worst_error(y, exact(*asked, given, rounds=False)) < case.plain_tolerance


@pytest.mark.parametrize(("tokens", "fmt", "act"), CASES)
def test_tokens(tokens: int, fmt: str, act: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, folder, 2)
    right(replace(SMALL, fmt=fmt, act=act), tokens, tokens // 3)


def test_a_token_of_padding_alone_gets_zeros(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, folder, 2)
    right(SMALL, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["plain", "channel"])
@pytest.mark.parametrize(("tokens", "act"), [(2, "silu"), (3, "gelu_tanh"), (4, "silu")])
def test_every_number_of_tokens(tokens: int, fmt: str, act: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, folder, 4)
    right(ExpertCase(11, 4, 512, 384, act, fmt=fmt), tokens, tokens // 4)
