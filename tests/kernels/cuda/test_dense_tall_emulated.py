"""The source of projections of 9 to 64 rows by warpgroup products, run thread by thread on the host, against float64.
On a GPU: `python -m tokenspeed.bench.gpu.chain --rows 32`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.emulated import EmulatedKernel, on_host
from tests.kernels.cuda.test_experts_tall_emulated import described
from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import poisoned
from tokenspeed.kernels.cuda import dense_tall
from tokenspeed.kernels.cuda.dense_tall import Variant, tall_rows, tensor_map, variant
from tokenspeed.kernels.triton.operands import Multiplied, Rows
from tokenspeed.quantization.fp8 import Fp8Weight, quantize_fp8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For compiled kernels."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def kernel(found: Variant, device: int) -> EmulatedKernel:
        return EmulatedKernel(folder, "dense_tall", found.defines(), "run_dense_tall.cpp")

    on_host(monkeypatch, dense_tall, kernel)
    monkeypatch.setattr(dense_tall, "encoded", described)
    tensor_map.cache_clear()


@pytest.mark.parametrize(
    ("tokens", "n", "k", "narrow", "splits", "biased"),
    [
        (9, 34, 256, True, 2, True),
        (17, 70, 384, False, 4, True),
        (32, 258, 640, True, 3, False),
        pytest.param(33, 130, 1024, True, 1, True, marks=pytest.mark.slow),
        pytest.param(64, 6, 576, False, 2, False, marks=pytest.mark.slow),
    ],
)
def test_rows(tokens: int, n: int, k: int, narrow: bool, splits: int, biased: bool) -> None:
    g = torch.Generator().manual_seed(SEED + tokens)
    w = (torch.randn(n, k, generator=g) * k**-0.5).bfloat16()
    wide = torch.randn(tokens, k + 16, generator=g).bfloat16()
    x, bias = wide[:, :k], torch.randn(n, generator=g) if biased else None
    weight: Multiplied = quantize_fp8(w) if narrow else w
    given, entered, values = Rows(x), x.double(), w.double()
    if isinstance(weight, Fp8Weight):
        scale = x.float().abs().amax(1) / 448
        q = (x.float() / scale[:, None]).to(torch.float8_e4m3fn)
        given, entered = Rows(q, scale), q.double() * scale[:, None].double()
        values = weight.q.double() * weight.scale.double()[:, None]
    found = variant(tokens, n, k, narrow, splits)
    assert found is not None
    with poisoned():
        y = tall_rows(given, weight, bias, found=found)
    assert y is not None
    wanted = entered @ values.T + (0 if bias is None else bias.double())
    assert float(((y.double() - wanted).abs() / (1 + wanted.abs())).nan_to_num(9e9).max()) < 0.01
