"""Triton's interpreter, switched on before triton is imported and mended where it computes wrongly."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_cast_impl = interpreter.InterpreterBuilder.cast_impl
_create_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp
_create_dot = interpreter.InterpreterBuilder.create_dot


def _cast(self, src, dst_type):
    """To bfloat16 by torch: the interpreter cuts bits off instead of rounding, and takes int8 for bits."""
    if dst_type.scalar != tl.bfloat16 or src.dtype.scalar not in (tl.float32, tl.int8):
        return _cast_impl(self, src, dst_type)
    values = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
    return interpreter.TensorHandle(values.view(torch.uint16).numpy(), dst_type.scalar)


def _fp_to_fp(self, src, dst_type, rounding_mode):
    """To e4m3 by torch: the interpreter loses the carry when a mantissa rounds up to the next power of two."""
    if dst_type.scalar != tl.float8e4nv:
        return _create_fp_to_fp(self, src, dst_type, rounding_mode)
    values = torch.from_numpy(src.data.astype(np.float32)).to(torch.float8_e4m3fn)
    return interpreter.TensorHandle(values.view(torch.uint8).numpy(), dst_type.scalar)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """bfloat16 by way of float32: the interpreter multiplies the bit patterns."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = (_create_fp_to_fp(self, side, tl.float32, None) for side in (a, b))
    return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)


interpreter.InterpreterBuilder.cast_impl = _cast
interpreter.InterpreterBuilder.create_fp_to_fp = _fp_to_fp
interpreter.InterpreterBuilder.create_dot = _dot
