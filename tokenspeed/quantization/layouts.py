"""Reads the tensors of a quantised matrix, by each layout of `formats.quantized`, to codes and scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.formats.quantized.awq import AwqLayout
from tokenspeed.formats.quantized.compressed_tensors import Int8Layout, PackedLayout
from tokenspeed.formats.quantized.fp8 import BLOCK, Fp8Layout
from tokenspeed.formats.quantized.gptq import GptqLayout
from tokenspeed.formats.quantized.layout import Layout
from tokenspeed.formats.quantized.nvfp4 import Nvfp4Layout
from tokenspeed.quantization.codes import NIBBLE_ZERO, Codes
from tokenspeed.quantization.unpack import E2M1_VALUES

Tensors = Mapping[str, torch.Tensor]
AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]
"""The nibble of a word that holds each of its eight outputs."""


def read_codes(layout: Layout, tensors: Tensors, rows: int, cols: int) -> Codes:
    """A matrix [rows, cols] from its tensors by suffix, on their device.

    Raises UnsupportedError for columns whose groups do not rise in order, and for zero points that the layout cannot
    tell.
    """
    if isinstance(layout, Fp8Layout):
        return _fp8(layout, tensors, rows, cols)
    if isinstance(layout, Int8Layout):
        scale, zero = _factors(tensors["weight_scale"]), _unless(tensors.get("weight_zero_point"), 0)
        if zero is not None and not layout.zeros:
            raise UnsupportedError("zero points other than 0 where the config says symmetric")
        return Codes(tensors["weight"], scale, _block(scale, rows, cols), zero)
    if isinstance(layout, PackedLayout):
        return _packed(layout, tensors, rows, cols)
    if isinstance(layout, GptqLayout):
        return _gptq(layout, tensors, rows, cols)
    if isinstance(layout, AwqLayout):
        return _awq(tensors, rows, cols)
    if isinstance(layout, Nvfp4Layout):
        return _nvfp4(layout, tensors)
    raise TypeError(f"{layout.fmt} is not read to codes")


def _fp8(layout: Fp8Layout, tensors: Tensors, rows: int, cols: int) -> Codes:
    scale = _factors(tensors[layout.scale])
    block = (BLOCK, BLOCK) if layout.grain == "block" else _block(scale, rows, cols)
    return Codes(tensors["weight"], scale.float(), block)


def _factors(scale: torch.Tensor) -> torch.Tensor:
    """Scales, or zero points, with two axes."""
    return scale.reshape(-1, 1) if scale.dim() < 2 else scale


def _block(scale: torch.Tensor, rows: int, cols: int) -> tuple[int, int]:
    return rows // scale.shape[0], cols // scale.shape[1]


def _unless(zero: torch.Tensor | None, usual: int) -> torch.Tensor | None:
    """Zero points [N, groups], None where all are as usual."""
    return None if zero is None or bool((zero == usual).all()) else _factors(zero)


def _halves(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] to uint8 [R, C, 8], or any bytes [R, C] to [R, C, 2]: four-bit codes, the lowest bits first."""
    packed = words.contiguous().view(torch.uint8).view(*words.shape, -1)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] to uint8 [R, C, 4]."""
    return words.contiguous().view(torch.uint8).view(*words.shape, -1)


def _signed(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes whose 128 is the 0 of int8 ones."""
    return codes.bitwise_xor(128).view(torch.int8)


def _packed(layout: PackedLayout, tensors: Tensors, rows: int, cols: int) -> Codes:
    split = _halves if layout.bits == 4 else _bytes
    codes, scale = split(tensors["weight_packed"]).flatten(1)[:, :cols], _factors(tensors["weight_scale"])
    block = _block(scale, rows, cols)
    _check_order(tensors.get("weight_g_idx"), block[1], "weight_g_idx")
    zero = None
    if layout.zeros:
        zero = split(tensors["weight_zero_point"]).transpose(1, 2).flatten(0, 1)[:rows]
    if layout.bits == 4:
        return Codes(codes, scale, block, _unless(zero, NIBBLE_ZERO))
    return Codes(_signed(codes.contiguous()), scale, block, _unless(_wide_zero(zero), 0))


def _wide_zero(zero: torch.Tensor | None) -> torch.Tensor | None:
    return None if zero is None else zero.to(torch.int16) - 128


def _gptq(layout: GptqLayout, tensors: Tensors, rows: int, cols: int) -> Codes:
    split = _halves if layout.bits == 4 else _bytes
    codes = split(tensors["qweight"]).permute(1, 0, 2).flatten(1)  # [K / 8, N, 8] to [N, K]
    scale, stored = tensors["scales"].t(), split(tensors["qzeros"]).flatten(1)[:, :rows].t()
    block = (1, cols // scale.shape[1])
    _check_order(tensors.get("g_idx"), block[1], "g_idx")
    largest = 2**layout.bits - 1
    if layout.v1 and bool((stored == largest).any()):
        raise UnsupportedError(
            f"a zero point of {largest + 1} or 0, which checkpoint_format 'gptq' does not tell apart"
        )
    zero = stored + 1 if layout.v1 else stored
    if layout.bits == 4:
        return Codes(codes, scale, block, _unless(zero, NIBBLE_ZERO))
    return Codes(_signed(codes), scale, block, _unless(_wide_zero(zero), 0))


def _awq(tensors: Tensors, rows: int, cols: int) -> Codes:
    codes, zero = (_halves(tensors[name])[..., AWQ_NIBBLES].flatten(1).t() for name in ("qweight", "qzeros"))
    scale = tensors["scales"].t()
    return Codes(codes.contiguous(), scale, (1, cols // scale.shape[1]), _unless(zero, NIBBLE_ZERO))


def _nvfp4(layout: Nvfp4Layout, tensors: Tensors) -> Codes:
    # An e4m3 scale times or over a float32 rounds once; the doubled values and the half are exact.
    block, whole = tensors["weight_scale"].double(), tensors[layout.whole].double().reshape(())
    scale = block / whole if layout.divides else block * whole
    return Codes(_e2m1(tensors[layout.packed]), (scale / 2).float(), (1, 16))


def _e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K / 2] to twice the values of their codes, int8 [N, K]."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.int8, device=packed.device)
    return table[_halves(packed).flatten(1).int()]


def _check_order(groups: torch.Tensor | None, size: int, name: str) -> None:
    """Raise UnsupportedError unless column k is of group k // size."""
    if groups is None or groups.numel() == 0:
        return
    wanted = torch.arange(groups.numel(), device=groups.device) // size
    if not bool((groups == wanted).all()):
        raise UnsupportedError(
            f"{name} is not in order: columns of a group that lie apart (act-order) are not supported"
        )
