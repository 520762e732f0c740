"""Random rows of any supported format with finite values, and gguf's own dequantisation as the oracle."""

import gguf
import numpy as np

from tokenspeed.formats.blocks import BLOCKS, row_bytes

FACTORS_AT = {
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
PLAIN = {"F32": np.float32, "F16": np.float16}


def random_rows(rng: np.random.Generator, fmt: str, rows: int, cols: int) -> np.ndarray:
    """uint8 [rows, row_bytes]: every bit random, except that float16 factors (or the values themselves) are finite."""
    if fmt in PLAIN:
        return rng.standard_normal((rows, cols)).astype(PLAIN[fmt]).view(np.uint8)
    if fmt == "BF16":
        return gguf.quants.quantize(
            rng.standard_normal((rows, cols)).astype(np.float32), gguf.GGMLQuantizationType.BF16
        )
    data = rng.integers(0, 256, (rows, row_bytes(fmt, cols)), dtype=np.uint8)
    blocks = data.reshape(-1, BLOCKS[fmt][1])
    for at in FACTORS_AT.get(fmt, ()):  # MXFP4 has exponents, any of which is finite
        factors = rng.standard_normal((len(blocks), 1)) * 10.0 ** rng.integers(-6, 2, (len(blocks), 1))
        blocks[:, at : at + 2] = factors.astype(np.float16).view(np.uint8)
    return data


def oracle(data: np.ndarray, fmt: str) -> np.ndarray:
    """float32 [rows, cols]."""
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[fmt]).astype(np.float32)
