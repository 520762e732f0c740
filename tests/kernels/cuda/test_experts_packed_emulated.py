"""The source of MXFP4 experts, run thread by thread on the host, against float64: tokens that share experts,
experts with more choices than a block has, tokens of padding, columns that end within a run. On a GPU: `python -m
tokenspeed.bench.gpu.experts --check --format mxfp4`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.cuda.emulated import PROCESSORS, EmulatedKernel, on_host
from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import ExpertCase, exact, poisoned, worst_error
from tokenspeed.kernels.cuda import experts_packed
from tokenspeed.kernels.cuda.experts_packed import Variant, Way, stream_packed, tensor_maps
from tokenspeed.kernels.cuda.tensor_maps import TensorMap
from tokenspeed.kernels.triton import expert_sums

SMALL = ExpertCase(5, 3, 416, 160, fmt="mxfp4")


def described(
    what: str, address: int, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> TensorMap:
    """In the place of `encoded`, for the emulated copies."""
    assert all(stride % 16 == 0 for stride in strides)
    return TensorMap((address, *sizes, *strides, *box, dtype.itemsize))


def combined(*grid: Any) -> Any:
    def run(
        parts: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, y: torch.Tensor, *rest: Any, **more: Any
    ) -> None:
        each = parts.view(*ids.shape, -1) * shares[..., None]
        y.copy_(torch.where((ids >= 0)[..., None], each, 0).sum(1))

    return run


class Combining:
    """In the place of the Triton kernel."""

    __getitem__ = staticmethod(combined)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For compiled kernels."""
    return tmp_path_factory.mktemp("emulated")


def emulate(patch: pytest.MonkeyPatch, folder: Path, way: Way) -> None:
    def kernel(found: Variant, device: int) -> EmulatedKernel:
        return EmulatedKernel(folder, "experts_packed", found.defines(), "run_experts_packed.cpp")

    on_host(patch, experts_packed, kernel)
    patch.setattr(experts_packed, "processors", lambda device: PROCESSORS)
    patch.setattr(experts_packed, "WAYS", dict.fromkeys(experts_packed.WAYS, (way,)))
    patch.setattr(experts_packed, "encoded", described)
    patch.setattr(expert_sums, "combine_kernel", Combining())
    tensor_maps.cache_clear()


def right(case: ExpertCase, tokens: int, padding: int) -> None:
    g = torch.Generator().manual_seed(SEED + tokens)
    given, asked = case.random(g), case.choices(tokens, g, padding)
    with poisoned():
        y = stream_packed(*asked, given)
    assert y is not None
    assert worst_error(y, exact(*asked, given)) < case.tolerance


@pytest.mark.parametrize(
    ("tokens", "act", "biased"), [pytest.param(1, "swiglu_clamped", True, marks=pytest.mark.slow), (7, "silu", False)]
)
def test_tokens(tokens: int, act: str, biased: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, folder, Way(3, 3, 1, 2))
    right(replace(SMALL, act=act, biased=biased), tokens, tokens // 3)


@pytest.mark.slow
def test_a_token_of_padding_alone_gets_zeros(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, folder, Way(3, 3, 1, 2))
    right(replace(SMALL, act="swiglu_clamped", biased=True), 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 8])
def test_rows_of_the_next_block_on_their_way(tokens: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, folder, Way(4, 2, 1, 2, buffers=2))
    right(ExpertCase(6, 4, 288, 352, "silu", False, "mxfp4"), tokens, tokens // 3)


@pytest.mark.slow
def test_more_choices_of_an_expert_than_a_block_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, folder, Way(4, 2, 1, 2))
    right(ExpertCase(3, 2, 128, 96, fmt="mxfp4"), 14, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "act", "step"),
    [
        (2, "silu", 2),
        (3, "gelu_tanh", 4),
        (5, "swiglu_clamped", 2),
        (8, "swiglu_clamped", 4),
        (9, "silu", 4),
        (16, "swiglu_clamped", 2),
        (31, "gelu_tanh", 2),
        (64, "swiglu_clamped", 2),
    ],
)
def test_every_number_of_tokens(
    tokens: int, act: str, step: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, folder, Way(4, 2, 1, step))
    right(ExpertCase(6, 4, 288, 352, act, act == "swiglu_clamped", "mxfp4"), tokens, tokens // 4)
