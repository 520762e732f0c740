import numpy as np
import pytest
import torch

from tests.quantization.blocks_data import oracle, random_rows
from tests.seeds import SEED
from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.formats.blocks import BLOCKS, row_bytes
from tokenspeed.quantization import unpack as module
from tokenspeed.quantization.unpack import unpack


def bits(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("rows, blocks", [(1, 1), (3, 5), (37, 2), (257, 3)])
@pytest.mark.parametrize("fmt", BLOCKS)
def test_equals_gguf_bit_for_bit(fmt, rows, blocks, seed, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1 << 12)
    cols = blocks * BLOCKS[fmt][0]
    data = random_rows(np.random.default_rng(seed), fmt, rows, cols)
    expected = torch.from_numpy(oracle(data, fmt))
    packed = torch.from_numpy(data.copy())
    assert (bits(unpack(packed, fmt, cols, torch.float32)) == bits(expected)).all()
    for dtype in (torch.bfloat16, torch.float16):
        got = unpack(packed, fmt, cols, dtype)
        assert got.shape == (rows, cols)
        assert got.dtype == dtype
        assert (bits(got) == bits(expected.to(dtype))).all()
    assert (packed.numpy() == data).all(), "the packed bytes were written to"


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("fmt", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_into_strided_out_and_reads_strided_rows(fmt, dtype, seed):
    cols, rows = 2 * BLOCKS[fmt][0], 11
    data = torch.from_numpy(random_rows(np.random.default_rng(seed), fmt, 2 * rows, cols))
    wide = torch.full((rows, cols + 7), 5.0, dtype=dtype)
    returned = unpack(data[::2], fmt, cols, dtype, wide[:, :cols])
    assert returned.data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :cols], unpack(data[::2].clone(), fmt, cols, dtype))
    assert (wide[:, cols:] == 5).all()


def test_no_rows():
    assert unpack(torch.empty(0, row_bytes("Q4_K", 512), dtype=torch.uint8), "Q4_K", 512, torch.float32).shape == (
        0,
        512,
    )


def test_refuses_formats_widths_and_shapes():
    with pytest.raises(UnsupportedError, match=r"IQ2_S.*supported: F32, F16, BF16"):
        unpack(torch.empty(1, 82, dtype=torch.uint8), "IQ2_S", 256, torch.float32)
    with pytest.raises(FormatError, match="multiple of 256 elements, not 640"):
        unpack(torch.empty(1, 360, dtype=torch.uint8), "Q4_K", 640, torch.float32)
    data = torch.empty(3, 34, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must be uint8"):
        unpack(data[:, :33], "Q8_0", 32, torch.float32)
    with pytest.raises(ValueError, match="must be uint8"):
        unpack(data.view(torch.int8), "Q8_0", 32, torch.float32)
    with pytest.raises(ValueError, match="out must be"):
        unpack(data, "Q8_0", 32, torch.float32, torch.empty(3, 32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="out must be"):
        unpack(data, "Q8_0", 32, torch.float32, torch.empty(32, 3).T)
