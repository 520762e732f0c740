"""The source of many rows by warpgroup products, run thread by thread on the host, against float64. On a GPU: `python -m
tokenspeed.bench.gpu.chain --rows 128`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.cuda.emulated import EmulatedKernel, on_host
from tests.kernels.cuda.test_experts_tall_emulated import described
from tests.seeds import SEED
from tokenspeed.bench.gpu.expert_cases import poisoned
from tokenspeed.kernels.cuda import dense_tall
from tokenspeed.kernels.cuda.dense_tall import Variant, multiply_rows, tensor_map, variant
from tokenspeed.kernels.triton.operands import Multiplied, Rows
from tokenspeed.quantization.fp8 import quantize_fp8


PROCESSORS = 4


def added(
    parts: torch.Tensor,
    x_scale: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    act: str,
) -> None:
    """In the place of the Triton kernel."""
    assert act == "none"
    factors = 1 if x_scale is None or scale is None else x_scale[:, None] * scale
    y.copy_(parts.sum(0) * factors + (0 if bias is None else bias))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For compiled kernels."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def kernel(found: Variant, device: int) -> EmulatedKernel:
        return EmulatedKernel(folder, "dense_tall", found.defines(), "run_dense_tall.cpp")

    on_host(monkeypatch, dense_tall, kernel)
    monkeypatch.setattr(dense_tall, "processors", lambda device: PROCESSORS)
    monkeypatch.setattr(dense_tall, "encoded", described)
    monkeypatch.setattr(dense_tall, "add_parts", added)
    tensor_map.cache_clear()


def right(tokens: int, n: int, k: int, narrow: bool, act: str, found: Variant) -> None:
    g = torch.Generator().manual_seed(SEED + tokens)
    height = n if act == "none" else 2 * n
    w = (torch.randn(height, k, generator=g) * k**-0.5).bfloat16()
    x, bias = torch.randn(tokens, k, generator=g).bfloat16(), torch.randn(height, generator=g)
    weight: Multiplied = quantize_fp8(w) if narrow else w
    given, entered, values = Rows(x), x.double(), w.double()
    if narrow:
        scale = x.float().abs().amax(1) / 448
        q = (x.float() / scale[:, None]).to(torch.float8_e4m3fn)
        given, entered = Rows(q, scale), q.double() * scale[:, None].double()
        values = weight.q.double() * weight.scale.double()[:, None]
    with poisoned():
        y = multiply_rows(given, weight, bias, act, found)
    assert y is not None
    wanted = entered @ values.T + bias.double()
    if act != "none":
        gate, up = wanted.chunk(2, 1)
        opened = torch.nn.functional.silu(gate) if act == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
        wanted = opened * up
    assert float(((y.double() - wanted).abs() / (1 + wanted.abs())).nan_to_num(9e9).max()) < 0.01


@pytest.mark.parametrize(
    ("tokens", "n", "k", "narrow", "act", "ways"),
    [
        (13, 70, 384, False, "none", {"splits": 2}),
        (17, 134, 640, True, "silu", {"blocks": 2}),
        (33, 258, 320, False, "none", {"blocks": 2}),
        (21, 600, 1024, True, "none", {"pair": 2, "splits": 2}),
        (9, 330, 512, False, "none", {"shared_rows": True}),
        (30, 70, 1024, True, "gelu_tanh", {"shared_rows": True, "blocks": 2, "pair": 2}),
    ],
)
def test_rows(tokens: int, n: int, k: int, narrow: bool, act: str, ways: dict[str, Any]) -> None:
    found = variant(tokens, n if act == "none" else 2 * n, k, narrow, act, **ways)
    assert found is not None
    right(tokens, n, k, narrow, act, found)
