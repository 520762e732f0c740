import gguf
import pytest

from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.formats.blocks import BLOCKS, GGML_NAMES, row_bytes


def test_sizes_and_ids_are_those_of_gguf():
    for name, size in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == size
    assert {kind.value: kind.name for kind in gguf.GGMLQuantizationType}.items() <= GGML_NAMES.items()


def test_row_bytes():
    assert row_bytes("Q6_K", 768) == 630
    assert row_bytes("BF16", 3) == 6
    with pytest.raises(FormatError, match="Q5_0 row holds a multiple of 32 elements, not 33"):
        row_bytes("Q5_0", 33)
    with pytest.raises(UnsupportedError, match=r"IQ2_XS.*Q4_K, Q5_K, Q6_K"):
        row_bytes("IQ2_XS", 256)
