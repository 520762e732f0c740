"""What `stream.cu` does to codes, thread by thread in plain Python: which bytes of a row and which columns of x each
thread of a group of four holds, the bits it makes of them, and the factors put on and taken back. In float64: exact."""

from __future__ import annotations

import torch

from tokenspeed.quantization.int4 import Int4Weight
from tokenspeed.quantization.int8 import Int8Weight
from tokenspeed.quantization.narrow import PackedWeight

X_FACTOR, CODE_FACTOR, E2M1_FACTOR = 2.0**64, 2.0**69, 2.0**62


def bf16(bits: torch.Tensor) -> torch.Tensor:
    """float64 of the halves of words, [..., 2], low half first; subnormal numbers count."""
    halves = torch.stack((bits & 0xFFFF, bits >> 16 & 0xFFFF), dim=-1)
    sign = 1.0 - 2.0 * (halves >> 15).double()
    exponent, mantissa = halves >> 7 & 0xFF, (halves & 0x7F).double()
    normal = (mantissa + 128) * 2.0 ** (exponent.double() - 134)
    return sign * torch.where(exponent == 0, mantissa * 2.0**-133, normal)


def product(weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    """Sums [N], float64, of one row of x [K]."""
    rows = weight.shape[0]
    wide = weight.q.contiguous().view(torch.uint8).view(rows, -1, 4, 4, 4).long()  # [N, step, thread, word, byte]
    words = (wide << torch.tensor([0, 8, 16, 24])).sum(-1)
    held = x.double() * X_FACTOR
    if isinstance(weight, Int8Weight):
        return _int8(words, held, x, weight.scale)
    return _int4(words, held, x, weight) if isinstance(weight, Int4Weight) else _mxfp4(words, held, weight.scale)


def _pairs(x: torch.Tensor, word: int) -> torch.Tensor:
    """Columns of x that belong to a word of four-bit codes: [step, thread, pair, 2]."""
    return x.view(-1, 4, 4, 4, 2)[:, word]


def _sums(bits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of words [N, step, thread] and pairs of x [step, thread, 2], over threads: [N, step]."""
    return (bf16(bits) * x).sum((-1, -2))


def _int8(words: torch.Tensor, x: torch.Tensor, plain: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    columns = x.view(-1, 4, 4, 2, 2)  # [step, thread, word, pair, 2]
    sums = -128 / CODE_FACTOR * plain.double().view(-1, 64).sum(1).expand(words.shape[:2])
    for j in range(4):
        word = words[..., j] ^ 0x80808080
        first = (word & 0xFF) | (word & 0xFF00) << 8
        second = (word >> 16 & 0xFF) | (word >> 24 & 0xFF) << 16
        sums = sums + _sums(first, columns[:, :, j, 0]) + _sums(second, columns[:, :, j, 1])
    return sums.sum(1) * scale.double() * CODE_FACTOR


def _int4(words: torch.Tensor, x: torch.Tensor, plain: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    low = -8 / CODE_FACTOR * plain.double().view(-1, 128).sum(1).expand(words.shape[:2])
    high = torch.zeros_like(low)
    for j in range(4):
        word, pairs = words[..., j], _pairs(x, j)
        low = low + _sums(word & 0x000F000F, pairs[:, :, 0]) + _sums(word >> 8 & 0x000F000F, pairs[:, :, 2])
        high = high + _sums(word & 0x00F000F0, pairs[:, :, 1]) + _sums(word >> 8 & 0x00F000F0, pairs[:, :, 3])
    return ((low + high * 0.0625) * weight.scale.t().double()).sum(1) * CODE_FACTOR


def _mxfp4(words: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    exponents = scale.transpose(0, 1).double()  # [N, step, block]
    total = torch.zeros(words.shape[0], dtype=torch.float64)
    for j in range(4):
        word, pairs = words[..., j], _pairs(x, j)
        shifted = [(word << 12, word << 6), (word << 8, word << 2), (word << 4, word >> 2), (word, word >> 6)]
        block = sum(
            _sums(signs & 0x80008000 | others & 0x01C001C0, pairs[:, :, p]) for p, (signs, others) in enumerate(shifted)
        )
        total += (block * 2.0 ** (exponents[..., j] - 127)).sum(1)
    return total * E2M1_FACTOR
