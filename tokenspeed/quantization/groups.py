"""Which format `--quantization` gives a matrix. No torch."""

from __future__ import annotations

from tokenspeed.contracts.errors import ConfigError

GROUP = 32
"""Columns that share a scale."""
MODES = {"int8": "Q8_0", "int4": "Q4_1"}
"""int4 has a least value per group beside its scale: against Q4_0, 11 % more bytes and 9 to 19 % less error on normal
to heavy-tailed weights."""
ENDS = "Q8_0"
"""Of the embedding and the head, in every mode."""
HEADS = ("lm_head", "score")
"""Of a language model, and of a classifier."""
PLAIN = ("F32", "F16", "BF16")


def quantized_format(mode: str, name: str, kind: str, cols: int, fmt: str) -> str:
    """The format of a matrix of `cols` columns that comes as `fmt`; unchanged where its columns are no whole groups,
    and of routers: their error would change which experts are taken.

    name, kind: of its WeightSpec. Raises ConfigError for a matrix that is quantised already.
    """
    if fmt not in PLAIN:
        raise ConfigError(f"--quantization {mode}: weight {name} is quantised already ({fmt}); leave the flag out")
    if cols % GROUP or kind == "router":
        return fmt
    return ENDS if kind == "embedding" or name in HEADS else MODES[mode]
