"""MXFP4 experts as gpt-oss publishes them: all experts of a layer in one tensor of codes and one of exponents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.formats.quantized.layout import Layout, Quantization, Rule, groups_of, names

METHOD = "mxfp4"
BLOCK = 32
EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class Mxfp4Layout(Layout):
    """`_blocks` uint8 [experts, N, K / 32, 16], the low half of a byte first, and `_scales` uint8 [experts, N, K / 32]:
    exponents biased by 127."""

    @property
    def fmt(self) -> str:
        return "MXFP4"

    @property
    def marker(self) -> str:
        return "blocks"

    def rules(self, rows: int, cols: int) -> dict[str, Rule]:
        """rows: of all experts, whose axis is left out."""
        blocks = groups_of(cols, BLOCK, METHOD)
        return {"blocks": Rule(((rows, blocks, BLOCK // 2),), ("U8",)), "scales": Rule(((rows, blocks),), ("U8",))}

    def tensor(self, source: str, suffix: str) -> str:
        return f"{source}_{suffix}"


def read_mxfp4(config: Mapping[str, Any]) -> Quantization:
    """From a quantization_config of quant_method "mxfp4", which means the experts alone."""
    names(config, METHOD, "modules_to_not_convert")
    layout = Mxfp4Layout()
    return Quantization(METHOD, lambda module: layout if EXPERTS in module else None, METHOD)
