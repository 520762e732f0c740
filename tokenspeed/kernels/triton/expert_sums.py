"""The weighted sum of each token's experts, from the parts of its choices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.launch import exact_options

COLUMNS, FEW_TOKENS, FEW_COLUMNS = 1024, 32, 512
"""Of a program, and of few tokens: Qwen3-30B-A3B in fp8 at 1 / 8 / 32 sequences 1.677 / 4.587 / 8.495 ms by 512, 1.691
/ 4.594 / 8.560 by 1024, 1.680 / 4.587 / 8.528 by 256."""
WARPS = 4


@triton.jit
def combine_kernel(parts, ids, shares, y, n, CHOICES: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
                   PDL: tl.constexpr) -> None:  # fmt: skip
    """y [tokens, n]: the sum of share * part over a token's choices, in order; zeros for a token without experts. ids
    were there before the kernel in front began. EARLY: the next kernel may start at once."""
    if PDL and EARLY:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Nobody has written parts of a token without experts.
    inside = column < tl.where(tl.load(ids + token * CHOICES) >= 0, n, 0)
    if PDL:
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(CHOICES):
        choice = token * CHOICES + j
        total += tl.load(shares + choice) * tl.load(parts + choice * n + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * n + column, tl.where(inside, total, 0.0).to(y.dtype.element_ty), mask=column < n)


def combine(
    parts: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, dtype: torch.dtype, ahead: bool, early: bool = False
) -> torch.Tensor:
    """[T, n] of a dtype: parts [T * k, n] by shares float32 [T, k]; zeros for tokens without experts, whose ids int32
    [T, k] are negative. ahead: launched before the kernel in front has ended, which must have waited for the ids.
    early: so is the next one."""
    (tokens, k), n = ids.shape, parts.shape[1]
    y = torch.empty(tokens, n, dtype=dtype, device=parts.device)
    columns = min(FEW_COLUMNS if tokens <= FEW_TOKENS else COLUMNS, triton.next_power_of_2(n))
    combine_kernel[(tokens, triton.cdiv(n, columns))](
        parts, ids, shares, y, n, CHOICES=k, BLOCK=columns, EARLY=early, **exact_options(WARPS, ahead)
    )
    return y
