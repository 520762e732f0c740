"""e4m3 weights and rows: scales, error bounds, refusals."""

from __future__ import annotations

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.quantization.fp8 import Fp8Weight, quantize_fp8, quantize_rows

STEP = 2**-4
"""Half the distance of neighbours in e4m3, relative to the smaller of them."""


def weights(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(SEED + rows)
    sizes = 10 ** (4 * torch.rand(rows, 1, generator=g) - 3)
    return (torch.randn(rows, cols, generator=g) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "block"])
@pytest.mark.parametrize("rows, cols", [(1, 16), (130, 300), (256, 128)])
def test_every_value_is_within_a_step(dtype: torch.dtype, granularity: str, rows: int, cols: int) -> None:
    w = weights(rows, cols, dtype)
    packed = quantize_fp8(w, granularity)  # type: ignore[arg-type]
    scale = packed.scale if packed.scale.dim() == 1 else packed.scale.repeat_interleave(128, 0)[:rows].amax(1)
    smallest = scale[:, None] * 2**-9
    error = (packed.dequantized(torch.float32) - w.float()).abs()
    assert (error <= STEP * w.float().abs() * 1.001 + smallest / 2).all()
    assert packed.q.float().abs().max() == 448


def test_scales_by_channel_tensor_and_block() -> None:
    w = weights(200, 150, torch.float32)
    torch.testing.assert_close(quantize_fp8(w).scale, w.abs().amax(1) / 448)
    torch.testing.assert_close(quantize_fp8(w, "tensor").scale, (w.abs().amax() / 448).expand(200))
    blocks = quantize_fp8(w, "block")
    assert blocks.scale.shape == (2, 2)
    torch.testing.assert_close(blocks.scale[1, 1], w[128:, 128:].abs().amax() / 448)
    assert (quantize_fp8(w).scale_block, blocks.scale_block) == (0, 128)


@pytest.mark.parametrize("granularity", ["channel", "tensor", "block"])
def test_experts_are_quantised_one_by_one(granularity: str) -> None:
    w = torch.stack([weights(130, 150, torch.float32), 3 * weights(130, 150, torch.float32).roll(7, 0)])
    packed = quantize_fp8(w, granularity)  # type: ignore[arg-type]
    assert packed.scale_block == (128 if granularity == "block" else 0)
    for expert, matrix in enumerate(w):
        alone = quantize_fp8(matrix, granularity)  # type: ignore[arg-type]
        assert torch.equal(packed.q[expert].float(), alone.q.float())
        assert torch.equal(packed.scale[expert], alone.scale)
        assert torch.equal(packed.dequantized(torch.float32)[expert], alone.dequantized(torch.float32))
    with pytest.raises(UnsupportedError, match=r"scales \(130,\) \(supported: .* \(2, 130\) or \(2, 2, 2\)\)"):
        Fp8Weight(packed.q, torch.ones(130))


def test_rows_of_zeros_stay_zeros() -> None:
    w = torch.zeros(3, 32)
    w[1] = 1
    for packed in (quantize_fp8(w), quantize_fp8(w, "block")):
        assert (packed.dequantized(torch.float32) == w).all()
    q, scale = quantize_rows(w)
    assert (q.float() * scale[:, None] == w).all()
    assert scale.isfinite().all()


def test_wrong_scales_and_types_are_refused() -> None:
    q = torch.zeros(200, 150, dtype=torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match=r"scales \(150,\) \(supported: .* \(200,\) or \(2, 2\)\)"):
        Fp8Weight(q, torch.ones(150))
    with pytest.raises(UnsupportedError, match="float32"):
        Fp8Weight(q.float(), torch.ones(200))
