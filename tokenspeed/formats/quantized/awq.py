"""AWQ's files, version "gemm": codes in 32-bit words along the outputs, interleaved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.formats.quantized.fp8 import is_kept
from tokenspeed.formats.quantized.layout import (
    Grid,
    Layout,
    Quantization,
    Rule,
    groups_of,
    names,
    only,
    refuse,
    whole,
    words_of,
)

METHOD = "awq"
BITS = 4


@dataclass(frozen=True)
class AwqLayout(Layout):
    """`qweight` int32 [K, N / 8], `qzeros` int32 [groups, N / 8], `scales` [groups, N]; nibble i of a word is output
    0, 2, 4, 6, 1, 3, 5, 7 of its eight. group: columns of one, 0 for all of a row."""

    group: int

    @property
    def fmt(self) -> str:
        return "AWQ_4"

    @property
    def grid(self) -> Grid:
        return Grid("int4", 1, self.group, zeros=True)

    @property
    def marker(self) -> str:
        return "qweight"

    def rules(self, rows: int, cols: int) -> dict[str, Rule]:
        if rows % (32 // BITS):
            raise refuse(METHOD, "a matrix of rows", rows, "multiples of 8")
        groups, words = groups_of(cols, self.group, METHOD), words_of(rows, BITS)
        return {
            "qweight": Rule(((cols, words),), ("I32",), axis=1, per=8),
            "qzeros": Rule(((groups, words),), ("I32",), axis=1, per=8),
            "scales": Rule(((groups, rows),), ("F16", "BF16", "F32"), axis=1),
        }


def read_awq(config: Mapping[str, Any]) -> Quantization:
    """From a quantization_config of quant_method "awq". Raises UnsupportedError naming what is not read."""
    bits = "w_bit" if "w_bit" in config else "bits"
    only(config, METHOD, bits, BITS)
    only({"version": str(config.get("version", "gemm")).lower()}, METHOD, "version", "gemm")
    only(config, METHOD, "zero_point", True)
    group = whole(config, METHOD, "q_group_size" if "q_group_size" in config else "group_size", 128)
    if group != -1 and group < 1:
        raise refuse(METHOD, "group_size", group, "-1, or columns")
    layout, kept = AwqLayout(max(0, group)), frozenset(names(config, METHOD, "modules_to_not_convert"))
    return Quantization(
        METHOD,
        lambda module: None if is_kept(module, kept) else layout,
        f"{METHOD} {layout}",
    )
