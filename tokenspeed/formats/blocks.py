"""How each tensor format lays out a row: fixed blocks of elements, fixed bytes per block. No torch.

Names, ids and sizes are those of ggml (`ggml.h`, `ggml-common.h`); F32, F16 and BF16 are blocks of one element.
"""

from __future__ import annotations

from tokenspeed.contracts.errors import FormatError, UnsupportedError

BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "MXFP4": (32, 17),
}
"""Supported format -> (elements per block, bytes per block)."""

SUPPORTED = ", ".join(BLOCKS)

GGML_NAMES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    4: "Q4_2",
    5: "Q4_3",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
"""Every tensor type id that ggml has given out -> its name, those it has since removed included."""


def row_bytes(fmt: str, cols: int) -> int:
    """Bytes of one row of `cols` elements.

    Raises UnsupportedError for a format outside BLOCKS, FormatError when the row is no whole number of blocks.
    """
    if fmt not in BLOCKS:
        raise UnsupportedError(f"tensor type {fmt} is not supported (supported: {SUPPORTED})")
    elements, size = BLOCKS[fmt]
    if cols % elements:
        raise FormatError(f"a {fmt} row holds a multiple of {elements} elements, not {cols}")
    return cols // elements * size
