"""The streaming kernel's way with codes, in its plain twin, against the values they stand for. The kernel itself is
checked on a GPU: `python -m tokenspeed.bench.gpu.packed --check`."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cuda.stream_twin import CODE_FACTOR, E2M1_FACTOR, X_FACTOR, bf16, product
from tests.seeds import SEED
from tokenspeed.kernels.cuda.program import SOURCES
from tokenspeed.quantization.int4 import int4_weight
from tokenspeed.quantization.narrow import PackedWeight, narrow


@pytest.mark.parametrize("mode", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("rows, columns", [(2, 128), (10, 1024), (8, 2176)])
def test_products_are_those_of_the_values(mode: str, rows: int, columns: int) -> None:
    g = torch.Generator().manual_seed(SEED + columns)
    weight = narrow(torch.randn(rows, columns, generator=g) / columns**0.5, mode, "w")
    assert isinstance(weight, PackedWeight)
    x = (torch.randn(columns, generator=g) + 0.5).bfloat16()
    expected = weight.dequantized(torch.float64) @ x.double()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(product(weight, x), expected, rtol=1e-9, atol=1e-9)


def test_scales_of_files() -> None:
    """float16 ones, of which the kernel makes float32."""
    g = torch.Generator().manual_seed(SEED)
    scale = (torch.rand(6, 8, generator=g) / 100).half()
    weight = int4_weight(torch.randint(0, 16, (6, 1024), generator=g), scale)
    assert weight.scale.dtype == torch.float16
    x = torch.randn(1024, generator=g).bfloat16()
    torch.testing.assert_close(product(weight, x), weight.dequantized(torch.float64) @ x.double(), rtol=1e-9, atol=1e-9)


def test_bits_are_what_torch_takes_them_for() -> None:
    bits = torch.randint(0, 1 << 16, (1000,), generator=torch.Generator().manual_seed(SEED))
    bits = torch.cat((bits[bits >> 7 & 0xFF != 0xFF], torch.arange(256)))
    expected = bits.to(torch.uint16).view(torch.bfloat16).double()
    assert (bf16(bits)[:, 0] == expected).all()


def test_the_source_has_the_same_factors_and_masks() -> None:
    source = (SOURCES / "row.cuh").read_text()
    for name, value in (("X_FACTOR", X_FACTOR), ("CODE_FACTOR", CODE_FACTOR), ("E2M1_FACTOR", E2M1_FACTOR)):
        stated = source.split(f"constexpr float {name} = ")[1].split("f;")[0]
        assert float(stated) == value
    for mask in ("0x000f000fu", "0x00f000f0u", "0x80008000u", "0x01c001c0u", "0x80808080u"):
        assert mask in source
