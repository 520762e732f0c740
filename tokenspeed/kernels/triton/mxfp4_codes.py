"""Four e2m1 codes of a 16-bit word (`quantization.mxfp4_experts`) as the values that tensor cores multiply."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenspeed.quantization.mxfp4_experts import RAISED

_RAISED = tl.constexpr(RAISED)
_PLACES = tl.constexpr(0x81C0)
"""Of a code's sign, exponent and mantissa in a bfloat16, whose value is then 2^-126 times the code's."""
_EXPONENTS = tl.constexpr(0x7F807F80)
WIDEN = tl.constexpr(
    """
    {
    .reg .b32 a, b, c;
    and.b32 a, $4, 0x81c081c0;
    mul.rn.bf16x2 $0, a, $5;
    shl.b32 a, $4, 3;
    and.b32 a, a, 0x81c081c0;
    mul.rn.bf16x2 $1, a, $6;
    shl.b32 a, $4, 6;
    and.b32 a, a, 0x81c081c0;
    mul.rn.bf16x2 $2, a, $7;
    shl.b32 a, $4, 1;
    shr.u32 b, $4, 3;
    shr.u32 c, $4, 7;
    and.b32 a, a, 0x80008000;
    lop3.b32 a, b, 0x01800180, a, 0xea;
    lop3.b32 a, c, 0x00400040, a, 0xea;
    mul.rn.bf16x2 $3, a, $8;
    }
    """
)
"""Two words $4 and for each of their four codes two factors $5 to $8: the codes' values times these, $0 to $3."""
UNSCALED = tl.constexpr(2.0 ** (126 - RAISED))
"""What sums of `quarters` are to be multiplied by where they were made FAST."""


@triton.jit
def quarters(words: tl.tensor, exponents: tl.tensor, FAST: tl.constexpr, dtype: tl.constexpr):
    """Of a run's words int16 [N, 32] and its blocks' stored exponents int32 [N], a byte each, the values of the four
    blocks, [N, 32] of `dtype` each. FAST: for NVIDIA GPUs from Hopper on and bfloat16, the values over UNSCALED."""
    if FAST:
        # Stored exponents at their places in a bfloat16, those of two blocks in a register.
        even, odd = (exponents << 7) & _EXPONENTS, (exponents >> 1) & _EXPONENTS
        first, third = _factors(even, words), _factors(even >> 16, words)
        second, fourth = _factors(odd, words), _factors(odd >> 16, words)
        return tl.inline_asm_elementwise(
            WIDEN,
            "=r,=r,=r,=r,r,r,r,r,r",
            [words, first, second, third, fourth],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        word = words.to(tl.int32)
        fourth = ((word << 1) & 0x8000) | ((word >> 3) & 0x180) | ((word >> 7) & 0x40)
        return (
            _values(word & _PLACES, exponents, 0, dtype),
            _values((word << 3) & _PLACES, exponents, 8, dtype),
            _values((word << 6) & _PLACES, exponents, 16, dtype),
            _values(fourth, exponents, 24, dtype),
        )


@triton.jit
def _factors(bits, words):
    """A block's power of two, times 2^RAISED, beside each word."""
    return tl.broadcast_to(bits.to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None], words.shape)


@triton.jit
def _values(bits, exponents, SHIFT: tl.constexpr, dtype: tl.constexpr):
    factor = ((((exponents >> SHIFT) & 255) - _RAISED) << 23).to(tl.float32, bitcast=True)
    # 2^126; for code 1 the bits are no normal number.
    wide = (bits << 16).to(tl.float32, bitcast=True) * 8.507059173023462e37
    return (wide * factor[:, None]).to(dtype)
