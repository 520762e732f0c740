"""e4m3 matrices with scales, as DeepSeek and Qwen publish them (quant_method "fp8") and in compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenspeed.contracts.errors import FormatError
from tokenspeed.formats.quantized.layout import FLOATS, Grid, Layout, Quantization, Rule, names, only, refuse

METHOD = "fp8"
BLOCK = 128
Grain = Literal["tensor", "channel", "block"]
STATIC = "activations get a scale per token as they come; the checkpoint's own input_scale is not read"


@dataclass(frozen=True)
class Fp8Layout(Layout):
    """`weight` e4m3 [N, K] and a scale for the whole, for each row, or for each 128 x 128 block; values are products.
    scale: the suffix of that tensor."""

    grain: Grain
    scale: str = "weight_scale"

    @property
    def fmt(self) -> str:
        return "F8_E4M3"

    @property
    def grid(self) -> Grid:
        down, across = {"tensor": (0, 0), "channel": (1, 0), "block": (BLOCK, BLOCK)}[self.grain]
        return Grid("fp8", down, across)

    @property
    def marker(self) -> str:
        return self.scale

    def rules(self, rows: int, cols: int) -> dict[str, Rule]:
        shapes: dict[Grain, tuple[tuple[int, ...], ...]] = {
            "tensor": ((), (1,), (1, 1)),
            "channel": ((rows, 1), (rows,)),
            "block": ((-(-rows // BLOCK), -(-cols // BLOCK)),),
        }
        scale = Rule(shapes[self.grain], FLOATS, per=BLOCK if self.grain == "block" else 1)
        return {"weight": Rule(((rows, cols),), ("F8_E4M3",)), self.scale: scale}


def read_fp8(config: Mapping[str, Any]) -> Quantization:
    """From a quantization_config of quant_method "fp8". Raises UnsupportedError for blocks other than 128 x 128."""
    only(config, METHOD, "fmt", None, "e4m3", "float8_e4m3fn")
    only(config, METHOD, "activation_scheme", None, "dynamic", "static")
    block = config.get("weight_block_size")
    if block is not None and list(block) != [BLOCK, BLOCK]:
        raise refuse(METHOD, "weight_block_size", block, f"[{BLOCK}, {BLOCK}]")
    layout = Fp8Layout("block", "weight_scale_inv") if block is not None else Fp8Layout("tensor")
    kept = frozenset(names(config, METHOD, "modules_to_not_convert") + names(config, METHOD, "ignored_layers"))
    notes = (STATIC,) if config.get("activation_scheme") == "static" else ()
    return Quantization(
        METHOD,
        lambda module: None if is_kept(module, kept) else layout,
        f"{METHOD} {layout}",
        True,
        ("*.input_scale",),
        notes,
    )


def is_kept(module: str, kept: frozenset[str]) -> bool:
    """Whether a module is one of those that stay as they were: by its whole name or parts of it that follow each other.
    Raises FormatError for an empty name."""
    if "" in kept:
        raise FormatError("quantization_config: an empty name among the modules that are not quantised")
    parts = module.split(".")
    ends = range(1, len(parts) + 1)
    return any(".".join(parts[first:end]) in kept for end in ends for first in range(end))
