"""Which format `--quantization` gives a matrix: on the CPU blocks of 32 columns, on GPUs what their kernels read. No
torch."""

from __future__ import annotations

from collections.abc import Iterable

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
GPU_MODES = ("fp8", "int8", "int4", "mxfp4")
"""On GPUs: of every projection but the head, which stays as it comes, as does the embedding. int8 and fp8 have a scale
per output channel, int4 one per 128 columns, mxfp4 one per 32."""
_SCALE_BYTES = 4
_RUN, _RUN_BYTES = 128, {"int4": 64 + 2, "mxfp4": 64 + 4}
"""Columns, and bytes of codes and scales that a row of so many takes."""


def gpu_bytes(mode: str, rows: int, cols: int) -> int:
    """Bytes of a matrix as a mode of a GPU holds it, scales included."""
    if mode in _RUN_BYTES:
        return rows * -(-cols // _RUN) * _RUN_BYTES[mode]
    return rows * (cols + _SCALE_BYTES)


def refuse_quantized(mode: str, name: str, formats: Iterable[str]) -> None:
    """Raise ConfigError for a matrix that is quantised already."""
    for fmt in formats:
        if fmt not in PLAIN:
            raise ConfigError(f"--quantization {mode}: weight {name} is quantised already ({fmt}); leave the flag out")


def refuse_stored(mode: str | None, method: str) -> None:
    """Raise ConfigError for a mode where a checkpoint's own config says that it is quantised."""
    if mode not in (None, "none"):
        raise ConfigError(
            f"--quantization {mode}: the checkpoint is quantised already (quantization_config {method!r}); leave the "
            "flag out"
        )


def quantized_format(mode: str, name: str, kind: str, cols: int, fmt: str) -> str:
    """The format of a matrix of `cols` columns that comes as `fmt`; unchanged where its columns are no whole groups,
    and of routers: their error would change which experts are taken.

    name, kind: of its WeightSpec. Raises ConfigError for a matrix that is quantised already.
    """
    refuse_quantized(mode, name, (fmt,))
    if cols % GROUP or kind == "router":
        return fmt
    return ENDS if kind == "embedding" or name in HEADS else MODES[mode]
