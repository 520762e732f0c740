"""Four-bit codes in 32-bit words, in the order in which kernels that stream rows take them.

A run of 128 columns is 16 words, 64 bytes. Word 4 p + j holds columns 32 j + 8 p to 32 j + 8 p + 7, of which the even
ones lie in its low half and the odd ones in its high half: nibble i is column 2 i of the eight, nibble 4 + i column
2 i + 1. So four threads that read 16 bytes each have a word of every 32 columns, and a word shifted and masked with
0x000f000f is a pair of adjacent columns in the halves of a register.
"""

from __future__ import annotations

import torch

RUN = 128
"""Columns of a run."""
WORD = 8
"""Codes in a word."""


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15, integers [N, K] with K a multiple of 128, to int32 [N, K / 8]."""
    rows, cols = codes.shape
    # [N, run, j, p, i, half] to [N, run, p, j, half, i]
    split = codes.view(rows, cols // RUN, 4, 4, 4, 2).permute(0, 1, 3, 2, 5, 4).reshape(rows, cols // WORD, WORD)
    low = split.to(torch.uint8)
    return (low[..., 0::2] | low[..., 1::2] << 4).contiguous().view(torch.int32).view(rows, cols // WORD)


def unpack_nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [N, W] to uint8 codes [N, 8 W] in the order of columns."""
    rows, count = words.shape
    packed = words.contiguous().view(torch.uint8).view(rows, count, WORD // 2)
    split = torch.stack((packed & 15, packed >> 4), dim=-1).view(rows, count // 16, 4, 4, 2, 4)
    return split.permute(0, 1, 3, 2, 5, 4).reshape(rows, count * WORD)
