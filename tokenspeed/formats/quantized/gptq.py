"""GPTQ's files: codes in 32-bit words along the inputs, zero points along the outputs, scales [groups, outputs]."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.contracts.errors import FormatError
from tokenspeed.formats.quantized.layout import (
    Grid,
    Layout,
    Quantization,
    Rule,
    groups_of,
    only,
    refuse,
    whole,
    words_of,
)

METHOD = "gptq"


@dataclass(frozen=True)
class GptqLayout(Layout):
    """`qweight` int32 [K bits / 32, N], `qzeros` int32 [groups, N bits / 32], `scales` [groups, N], `g_idx` int32 [K]:
    the group of each column, which must rise in order. group: columns of one, 0 for all of a row. v1: zero points are
    stored one too small."""

    bits: int
    group: int
    v1: bool = True

    @property
    def fmt(self) -> str:
        return f"GPTQ_{self.bits}"

    @property
    def grid(self) -> Grid:
        return Grid("int4" if self.bits == 4 else "int8", 1, self.group, zeros=True)

    @property
    def marker(self) -> str:
        return "qweight"

    def rules(self, rows: int, cols: int) -> dict[str, Rule]:
        per_word = 32 // self.bits
        if rows % per_word or cols % per_word:
            raise refuse(METHOD, "a matrix of shape", [rows, cols], f"multiples of {per_word}")
        groups = groups_of(cols, self.group, METHOD)
        return {
            "qweight": Rule(((words_of(cols, self.bits), rows),), ("I32",), axis=1),
            "qzeros": Rule(((groups, words_of(rows, self.bits)),), ("I32",), axis=1, per=per_word),
            "scales": Rule(((groups, rows),), ("F16", "BF16", "F32"), axis=1),
            "g_idx": Rule(((cols,),), ("I32",), needed=False, axis=1),
        }


def read_gptq(config: Mapping[str, Any]) -> Quantization:
    """From a quantization_config of quant_method "gptq". Raises UnsupportedError naming what is not read."""
    only(config, METHOD, "bits", 4, 8)
    only(config, METHOD, "checkpoint_format", None, "gptq", "gptq_v2")
    only(config, METHOD, "pack_dtype", None, "int32")
    only(config, METHOD, "is_marlin_format", None, False)
    group = whole(config, METHOD, "group_size", 128)
    if group != -1 and group < 1:
        raise refuse(METHOD, "group_size", group, "-1, or columns")
    layout = GptqLayout(config["bits"], max(0, group), config.get("checkpoint_format") != "gptq_v2")
    kept = _kept(config)
    return Quantization(
        METHOD,
        lambda module: None if any(pattern.match(module) for pattern in kept) else layout,
        f"{METHOD} {layout}",
    )


def _kept(config: Mapping[str, Any]) -> list[re.Pattern[str]]:
    """Of GPTQModel's `dynamic` rules the modules that stay as they were; rules with other settings are refused."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise FormatError(f"quantization_config {METHOD!r}: dynamic must be an object")
    for pattern in dynamic:
        if not pattern.startswith("-:"):
            raise refuse(METHOD, "dynamic", pattern, "rules that begin with -:")
    try:
        return [re.compile(pattern.removeprefix("-:")) for pattern in dynamic]
    except re.error as error:
        raise FormatError(f"quantization_config {METHOD!r}: dynamic: {error}") from None
