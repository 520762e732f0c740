"""Random valid data of every packed format, and what it means in float64."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

FACTORS: dict[str, tuple[int, ...]] = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Where the float16 factors of a block lie; any bytes will do elsewhere."""


def random_rows(
    fmt: str, rows: int, cols: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Bytes [rows, row bytes] as a file holds them, and their values [rows, cols]."""
    if fmt in FACTORS:
        kind = gguf.GGMLQuantizationType[fmt]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, size=(rows, cols // block, size), dtype=np.uint8)
        for at in FACTORS[fmt]:
            factor = (rng.normal(size=(rows, cols // block, 1)) * 0.01).astype(np.float16)
            data[:, :, at : at + 2] = factor.view(np.uint8)
        packed = data.reshape(rows, -1)
        return packed, gguf.dequantize(packed, kind).astype(np.float64)
    values = rng.normal(size=(rows, cols)).astype(np.float32)
    if fmt == "BF16":
        words = (values.view(np.uint32) >> 16).astype(np.uint16)
        return words.view(np.uint8).reshape(rows, -1), (words.astype(np.uint32) << 16).view(np.float32).astype(float)
    stored = values.astype(np.float16 if fmt == "F16" else np.float32)
    return stored.view(np.uint8).reshape(rows, -1), stored.astype(np.float64)
