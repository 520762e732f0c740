"""The source of experts by warpgroup products, run thread by thread on the host, against float64: tokens that share
experts, experts with more choices than a block has, tokens of padding. On a GPU: `python -m
tokenspeed.bench.gpu.experts --check --format bf16 fp8`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.emulated import PROCESSORS, EmulatedKernel, on_host
from tests.kernels.cuda.test_experts_packed_emulated import Combining
from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import ExpertCase, exact, poisoned, worst_error
from tokenspeed.kernels.cuda import experts_tall
from tokenspeed.kernels.cuda.experts_tall import Variant, multiply_experts, tensor_map
from tokenspeed.kernels.cuda.tensor_maps import TensorMap
from tokenspeed.kernels.triton import expert_sums

SMALL = ExpertCase(5, 3, 384, 128)


def described(
    what: str,
    address: int,
    dtype: torch.dtype,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzled: bool,
) -> TensorMap:
    """In the place of `encoded`, for the emulated copies."""
    assert all(stride % 16 == 0 for stride in strides)
    return TensorMap((address, *sizes, *strides, *box, dtype.itemsize + 256 * swizzled))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For compiled kernels."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def kernel(found: Variant, device: int) -> EmulatedKernel:
        return EmulatedKernel(folder, "experts_tall", found.defines(), "run_experts_tall.cpp")

    on_host(monkeypatch, experts_tall, kernel)
    monkeypatch.setattr(experts_tall, "processors", lambda device: PROCESSORS)
    monkeypatch.setattr(experts_tall, "encoded", described)
    monkeypatch.setattr(expert_sums, "combine_kernel", Combining())
    tensor_map.cache_clear()


def right(case: ExpertCase, tokens: int, padding: int) -> None:
    g = torch.Generator().manual_seed(SEED + tokens)
    given, asked = case.random(g), case.choices(tokens, g, padding)
    with poisoned():
        y = multiply_experts(*asked, given)
    assert y is not None
    assert worst_error(y, exact(*asked, given)) < case.tolerance


@pytest.mark.parametrize(
    ("tokens", "fmt", "act"),
    [pytest.param(2, "channel", "silu", marks=pytest.mark.slow), (19, "channel", "gelu_tanh"), (9, "plain", "silu")],
)
def test_tokens(tokens: int, fmt: str, act: str) -> None:
    right(replace(SMALL, fmt=fmt, act=act), tokens, tokens // 4)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["plain", "channel"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 32, 33, 128])
def test_every_number_of_tokens(tokens: int, fmt: str) -> None:
    right(replace(SMALL, fmt=fmt), tokens, tokens // 8)
