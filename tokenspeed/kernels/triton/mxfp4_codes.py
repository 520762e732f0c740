"""Eight e2m1 codes of a word (`quantization.mxfp4_experts`) as the values that tensor cores multiply."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenspeed.quantization.mxfp4_experts import RAISED

_RAISED = tl.constexpr(RAISED)
_PLACES, _MANTISSAS = tl.constexpr(0x81C081C0), tl.constexpr(0x00400040)
"""Of two codes' signs, exponents and mantissas in two bfloat16, whose values are then 2^-126 times the codes'."""
_EXPONENTS = tl.constexpr(0x7F807F80)
WIDEN = tl.constexpr(
    """
    {
    .reg .b32 a, b;
    and.b32 a, $4, 0x81c081c0;
    mul.rn.bf16x2 $0, a, $5;
    shf.l.wrap.b32 a, $4, $4, 6;
    and.b32 a, a, 0x81c081c0;
    mul.rn.bf16x2 $1, a, $6;
    shf.l.wrap.b32 a, $4, $4, 12;
    and.b32 a, a, 0x81c081c0;
    mul.rn.bf16x2 $2, a, $7;
    shf.l.wrap.b32 a, $4, $4, 10;
    shf.l.wrap.b32 b, $4, $4, 2;
    and.b32 a, a, 0x81808180;
    lop3.b32 a, b, 0x00400040, a, 0xea;
    mul.rn.bf16x2 $3, a, $8;
    }
    """
)
"""A word $4 and for each of its four blocks two factors $5 to $8: the values of two codes times these, $0 to $3."""
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
        low, high = tl.split(tl.reshape(words, [words.shape[0], words.shape[1] // 2, 2]))
        word = low.to(tl.uint16, bitcast=True).to(tl.uint32) | high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        fourth = (_turned(word, 10) & (_PLACES ^ _MANTISSAS)) | (_turned(word, 2) & _MANTISSAS)
        return (
            _values(word & _PLACES, exponents, 0, dtype),
            _values(_turned(word, 6) & _PLACES, exponents, 8, dtype),
            _values(_turned(word, 12) & _PLACES, exponents, 16, dtype),
            _values(fourth, exponents, 24, dtype),
        )


@triton.jit
def _turned(word, LEFT: tl.constexpr):
    return word << LEFT | word >> (32 - LEFT)


@triton.jit
def _factors(bits, words):
    """A block's power of two, times 2^RAISED, beside each word."""
    return tl.broadcast_to(bits.to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None], words.shape)


@triton.jit
def _values(bits, exponents, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """Of pairs of bfloat16, [N, 16], one after the other."""
    factor = ((((exponents >> SHIFT) & 255) - _RAISED) << 23).to(tl.float32, bitcast=True)
    both = tl.reshape(tl.join(bits << 16, bits & 0xFFFF0000), [bits.shape[0], bits.shape[1] * 2])
    # 2^126; for code 1 the bits are no normal number.
    wide = both.to(tl.float32, bitcast=True) * 8.507059173023462e37
    return (wide * factor[:, None]).to(dtype)
