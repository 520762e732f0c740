"""Packed rows to floating point, in plain torch: the reference for kernels and the way weights are unpacked once.

Block layouts are those of ggml (`ggml-common.h`). All arithmetic is float32, rounded once to the wanted dtype, so
float32 output equals ggml's own dequantisation bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenspeed.formats.blocks import BLOCKS, row_bytes

CHUNK_ELEMENTS = 1 << 21
"""Elements unpacked at a time: 8 MiB of float32, small enough for a last-level cache, long enough to thread."""

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TOP_BITS = 0x8080808080808080 - 2**64


def unpack(
    data: torch.Tensor, fmt: str, cols: int, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Unpack rows of any format of `formats.blocks` into a fresh tensor, or into `out`.

    data: uint8 [rows, row_bytes(fmt, cols)]. Returns [rows, cols] of `dtype` on the device of `data`; `out`, where
    given, must have that shape and dtype and contiguous rows. Raises UnsupportedError for other formats, FormatError
    when `cols` is no whole number of blocks, ValueError for tensors of the wrong shape or dtype.
    """
    nbytes = row_bytes(fmt, cols)
    rows = data.shape[0]
    if data.dtype != torch.uint8 or data.shape != (rows, nbytes):
        raise ValueError(f"{fmt} data of {cols} columns must be uint8 [rows, {nbytes}], got {data.dtype} {data.shape}")
    if out is None:
        out = torch.empty(rows, cols, dtype=dtype, device=data.device)
    if out.dtype != dtype or out.shape != (rows, cols) or (rows > 0 and not out[0].is_contiguous()):
        raise ValueError(f"out must be {dtype} [{rows}, {cols}], got {out.dtype} {out.shape} {out.stride()}")
    if fmt in _PLAIN:
        return out.copy_(data.contiguous().view(_PLAIN[fmt]))
    _unpack_blocks(data, fmt, out)
    return out


def _unpack_blocks(data: torch.Tensor, fmt: str, out: torch.Tensor) -> None:
    elements, size = BLOCKS[fmt]
    rows, cols = out.shape
    step = max(1, CHUNK_ELEMENTS // cols)
    direct = out.dtype == torch.float32 and out.is_contiguous()
    scratch = None if direct else torch.empty(min(step, rows), cols, dtype=torch.float32, device=out.device)
    for start in range(0, rows, step):
        target = out[start : start + step]
        values = target if scratch is None else scratch[: len(target)]
        _UNPACKERS[fmt](data[start : start + step].reshape(-1, size), values.view(-1, elements))
        if scratch is not None:
            target.copy_(values)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _signed(quants: torch.Tensor, offset: int) -> torch.Tensor:
    """Unsigned quants in place to int8 quants - offset."""
    return quants.sub_(offset).view(torch.int8)


def _unpack_q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[d: f16][32 x int8]; value = d * q."""
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_half(blocks, 0))


def _unpack_q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[d: f16][16 bytes: low nibbles are elements 0..15, high ones 16..31]; value = d * (q - 8)."""
    packed = blocks[:, 2:]
    out[:, :16] = _signed(packed & 15, 8)
    out[:, 16:] = _signed(packed >> 4, 8)
    out.mul_(_half(blocks, 0))


def _unpack_q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[d: f16][4 bytes: bit i is the fifth bit of element i][16 bytes of nibbles as in Q4_0]; value = d * (q - 16)."""
    packed = blocks[:, 6:]
    sign = _minus_16_where_clear(blocks[:, 2:6])
    out[:, :16] = (packed & 15).view(torch.int8).bitwise_or_(sign[:, :16])
    out[:, 16:] = (packed >> 4).view(torch.int8).bitwise_or_(sign[:, 16:])
    out.mul_(_half(blocks, 0))


def _minus_16_where_clear(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, b] to int8 [n, 8 * b], lowest bit first: 0 where the bit is set, -16 (0xf0) where it is clear.

    Eight lanes at a time inside an int64: copy the byte to all lanes, keep bit i in lane i, subtract from 0x80 (no lane
    borrows from the next), so that the top bit is left only where the bit was clear.
    """
    lanes = packed.long().mul_(0x0101010101010101).bitwise_and_(0x8040201008040201 - 2**64)
    lanes.neg_().add_(_TOP_BITS).bitwise_and_(_TOP_BITS)
    return lanes.view(torch.int8).bitwise_right_shift_(3)


def _unpack_q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[d: f16][m: f16][16 bytes of nibbles as in Q4_0]; value = d * q + m."""
    packed = blocks[:, 4:]
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _unpack_q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[d: f16][m: f16][4 bytes of fifth bits][16 bytes of nibbles], both as in Q5_0; value = d * q + m."""
    packed = blocks[:, 8:]
    sign = _minus_16_where_clear(blocks[:, 4:8])
    out[:, :16] = (packed & 15).view(torch.int8).bitwise_or_(sign[:, :16]).add_(16)
    out[:, 16:] = (packed >> 4).view(torch.int8).bitwise_or_(sign[:, 16:]).add_(16)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _bit_pairs(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 64] to codes 0..3, uint8 [n, 8, 32]: each 32 bytes hold four runs of 32, lowest bits first."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)[:, None]
    return (packed.unflatten(1, (2, 1, 32)) >> shifts).bitwise_and_(3).flatten(1, 2)


def _unpack_q2_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[16 bytes: 4-bit scale, 4-bit min][64 bytes of bit pairs][d: f16][dmin: f16]; value = d * scale * q - dmin * min.

    A scale and a min cover 16 elements.
    """
    out.unflatten(1, (8, 32)).copy_(_bit_pairs(blocks[:, 16:80]))
    by_sixteen = out.unflatten(1, (16, 16))
    by_sixteen.mul_((_half(blocks, 80) * (blocks[:, :16] & 15)).unsqueeze(-1))
    by_sixteen.sub_((_half(blocks, 82) * (blocks[:, :16] >> 4)).unsqueeze(-1))


def _unpack_q3_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[32 bytes: bit j of byte i is the third bit of element 32 j + i][64 bytes of bit pairs][12 bytes: 16 x 6-bit
    scale][d: f16]; value = d * (scale - 32) * (q - 4).

    The low nibbles of the scales are those of bytes 0..7 (low ones first), their top pairs lie in bytes 8..11.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    third = (blocks[:, None, :32] >> shifts).bitwise_and_(1).bitwise_left_shift_(2)
    out.unflatten(1, (8, 32)).copy_(_signed(_bit_pairs(blocks[:, 32:96]).bitwise_or_(third), 4))
    packed = blocks[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), dim=1)
    top = (packed[:, None, 8:] >> shifts[:4] * 2).bitwise_and_(3).flatten(1)
    scales = _signed(low | top << 4, 32).float().mul_(_half(blocks, 108))
    out.unflatten(1, (16, 16)).mul_(scales.unsqueeze(-1))


def _unpack_q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[d: f16][dmin: f16][12 bytes as in Q4_K][32 bytes: bit j of byte i is the fifth bit of element 32 j + i]
    [128 bytes of nibbles as in Q4_K]; value = d * scale * q - dmin * min."""
    scale, least = _six_bit_pairs(blocks[:, 4:16])
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, None, 16:48] >> shifts).bitwise_and_(1).bitwise_left_shift_(4)
    packed = blocks[:, 48:].unflatten(1, (4, 1, 32))
    nibbles = torch.cat((packed & 15, packed >> 4), dim=2).flatten(1, 2)
    by_sub_block = out.unflatten(1, (8, 32))
    by_sub_block.copy_(nibbles.bitwise_or_(fifth))
    by_sub_block.mul_((_half(blocks, 0) * scale).unsqueeze(-1))
    by_sub_block.sub_((_half(blocks, 2) * least).unsqueeze(-1))


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the sixteen codes of IQ4_NL and IQ4_XS stand for."""


def _looked_up(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=codes.device)[codes.int()]


def _unpack_iq4_nl(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[d: f16][16 bytes of codes as in Q4_0]; value = d * table[code]."""
    packed = blocks[:, 2:]
    out[:, :16] = _looked_up(packed & 15)
    out[:, 16:] = _looked_up(packed >> 4)
    out.mul_(_half(blocks, 0))


def _unpack_iq4_xs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[d: f16][2 bytes: top pairs of 8 x 6-bit scale][4 bytes: their low nibbles][128 bytes: 8 x 16 bytes of codes as
    in Q4_0]; value = d * (scale - 32) * table[code]."""
    even = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=2).flatten(1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    top = (blocks[:, 2:4, None] >> shifts).bitwise_and_(3).flatten(1)
    scales = _signed(even | top << 4, 32).float().mul_(_half(blocks, 0))
    packed = blocks[:, 8:].unflatten(1, (8, 16))
    values = out.unflatten(1, (8, 2, 16))
    values[:, :, 0] = _looked_up(packed & 15)
    values[:, :, 1] = _looked_up(packed >> 4)
    out.unflatten(1, (8, 32)).mul_(scales.unsqueeze(-1))


E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice what the codes of e2m1 stand for (OCP Microscaling Formats 1.0), as ggml has them: zero has no sign."""


def _unpack_mxfp4(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[e: exponent][16 bytes of codes as in Q4_0]; value = 2^(e - 128) * table[code]."""
    packed, exponents = blocks[:, 1:], blocks[:, :1].int()
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=blocks.device)
    out[:, :16] = values[(packed & 15).int()]
    out[:, 16:] = values[(packed >> 4).int()]
    # Bits of float32; the two smallest are subnormal.
    bits = torch.where(exponents < 2, (1 << 21) << exponents.clamp(max=1), (exponents - 1) << 23)
    out.mul_(bits.view(torch.float32))


def _unpack_q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[d: f16][dmin: f16][12 bytes: 8 x 6-bit scale and min][128 bytes]; value = d * scale * q - dmin * min.

    Each 32 bytes hold two sub-blocks of 32: low nibbles the first, high nibbles the second.
    """
    scale, least = _six_bit_pairs(blocks[:, 4:16])
    packed = blocks[:, 16:].view(-1, 4, 32)
    values = out.view(-1, 4, 2, 32)
    values[:, :, 0] = packed & 15
    values[:, :, 1] = packed >> 4
    by_sub_block = out.view(-1, 8, 32)
    by_sub_block.mul_((_half(blocks, 0) * scale).unsqueeze(-1))
    by_sub_block.sub_((_half(blocks, 2) * least).unsqueeze(-1))


def _six_bit_pairs(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [n, 12] to scales and mins, uint8 [n, 8] each.

    Bytes 0..3 and 4..7 hold scales and mins 0..3 in their low six bits, and in their top two bits the top two of scales
    and mins 4..7, whose low four bits are the low and high nibbles of bytes 8..11.
    """
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (low & 15) | ((first >> 2) & 48)), dim=1)
    mins = torch.cat((second & 63, (low >> 4) | ((second >> 2) & 48)), dim=1)
    return scales, mins


def _unpack_q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """[128 bytes low nibbles][64 bytes top bit pairs][16 x int8 scale][d: f16]; value = d * scale * (q - 32).

    Each half of 128 elements is four runs of 32: their low bits are nibbles (low, low, high, high) of bytes (0..31,
    32..63, 0..31, 32..63), their top bits the pairs 0, 2, 4, 6 of 32 bytes. A scale covers 16 elements.
    """
    low = blocks[:, :128].view(-1, 2, 2, 32)
    top = blocks[:, 128:192].view(-1, 2, 32)
    runs = out.view(-1, 2, 4, 32)
    nibbles = (low & 15, low >> 4)
    for run in range(4):
        pair = (top >> (2 * run)).bitwise_and_(3).bitwise_left_shift_(4)
        runs[:, :, run] = _signed(pair.bitwise_or_(nibbles[run // 2][:, :, run % 2]), 32)
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    out.view(-1, 16, 16).mul_(scales.unsqueeze(-1))


_UNPACKERS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "Q8_0": _unpack_q8_0,
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q5_0": _unpack_q5_0,
    "Q5_1": _unpack_q5_1,
    "Q2_K": _unpack_q2_k,
    "Q3_K": _unpack_q3_k,
    "Q4_K": _unpack_q4_k,
    "Q5_K": _unpack_q5_k,
    "Q6_K": _unpack_q6_k,
    "IQ4_NL": _unpack_iq4_nl,
    "IQ4_XS": _unpack_iq4_xs,
    "MXFP4": _unpack_mxfp4,
}
