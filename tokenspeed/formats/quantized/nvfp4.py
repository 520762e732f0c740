"""NVFP4 matrices: e2m1 codes in blocks of 16 columns with an e4m3 scale each, and one float32 scale for the whole."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.formats.quantized.layout import Layout, Rule, groups_of

BLOCK = 16


@dataclass(frozen=True)
class Nvfp4Layout(Layout):
    """uint8 [N, K / 2], the low half of a byte first; `weight_scale` e4m3 [N, K / 16]; a float32. divides: whether
    that divides the scales, else it multiplies them. packed, whole: suffixes of the first and the last."""

    packed: str
    whole: str
    divides: bool

    @property
    def fmt(self) -> str:
        return "NVFP4"

    @property
    def marker(self) -> str:
        return self.whole

    def rules(self, rows: int, cols: int) -> dict[str, Rule]:
        blocks = groups_of(cols, BLOCK, "NVFP4")
        return {
            self.packed: Rule(((rows, cols // 2),), ("U8",)),
            "weight_scale": Rule(((rows, blocks),), ("F8_E4M3",)),
            self.whole: Rule(((1,), ()), ("F32",)),
        }


COMPRESSED_TENSORS = Nvfp4Layout("weight_packed", "weight_global_scale", divides=True)
MODELOPT = Nvfp4Layout("weight", "weight_scale_2", divides=False)
