"""Random valid data of every packed format, and what it means in float64."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

from tests.quantization.blocks_data import FACTORS_AT as FACTORS

EXPONENTS = "MXFP4"
"""Its blocks begin with one instead of factors."""
BLOCK_FORMATS = (*FACTORS, EXPONENTS)


def random_rows(
    fmt: str, rows: int, cols: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Bytes [rows, row bytes] as a file holds them, and their values [rows, cols]."""
    if fmt in BLOCK_FORMATS:
        kind = gguf.GGMLQuantizationType[fmt]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, size=(rows, cols // block, size), dtype=np.uint8)
        for at in FACTORS.get(fmt, ()):
            factor = (rng.normal(size=(rows, cols // block, 1)) * 0.01).astype(np.float16)
            data[:, :, at : at + 2] = factor.view(np.uint8)
        if fmt == EXPONENTS:
            data[:, :, 0] = rng.integers(112, 124, size=(rows, cols // block))
        packed = data.reshape(rows, -1)
        return packed, gguf.dequantize(packed, kind).astype(np.float64)
    values = rng.normal(size=(rows, cols)).astype(np.float32)
    if fmt == "BF16":
        words = (values.view(np.uint32) >> 16).astype(np.uint16)
        return words.view(np.uint8).reshape(rows, -1), (words.astype(np.uint32) << 16).view(np.float32).astype(float)
    stored = values.astype(np.float16 if fmt == "F16" else np.float32)
    return stored.view(np.uint8).reshape(rows, -1), stored.astype(np.float64)
