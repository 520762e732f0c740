"""Keys and values as KV pages hold them, in torch.

An entry is one key or value of one head of one token. bfloat16, float16, float32 and float8_e4m3fn hold the values
alone. int8 holds codes, padding to 2 bytes, and a bfloat16 scale for each 32 columns; value = scale * code. Keys have a
few columns far larger than the rest: with one scale for all, the demo model's log-probabilities are off by three times
as much.

What is written into fp8 pages is over the layer's `KvScale` where a checkpoint has one. Else that is 1, as in vLLM: a
scale measured on the first prompts would make answers depend on who asked first, and e4m3's steps are relative from
2^-6 to 448.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenspeed.ops.definitions import KV_GROUP, kv_entry_bytes

KV_TORCH: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
}
FP8_MAX = 448.0
"""Largest value of e4m3."""
INT8_MAX = 127


def kv_dtype_name(dtype: torch.dtype) -> str:
    """The name that --kv-cache-dtype has for a dtype. Raises ValueError for one that pages cannot have."""
    for name, known in KV_TORCH.items():
        if known == dtype:
            return name
    raise ValueError(f"KV pages cannot hold {dtype}")


def entry_columns(dtype: torch.dtype, head_dim: int) -> int:
    """Elements of `dtype` that an entry takes."""
    return kv_entry_bytes(kv_dtype_name(dtype), head_dim) // dtype.itemsize


def encode(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Entries [..., entry_columns] of `dtype` from values [..., head_dim]; e4m3 saturates, int8 rounds to absmax / 127.

    int8 groups whose scale would be below the normal floats become zeros.
    """
    if dtype == torch.float8_e4m3fn:
        return x.float().clamp(-FP8_MAX, FP8_MAX).to(dtype)
    return _encode_int8(x.float()) if dtype == torch.int8 else x.to(dtype)


def _encode_int8(x: torch.Tensor) -> torch.Tensor:
    head_dim = x.shape[-1]
    groups = F.pad(x, (0, -head_dim % KV_GROUP)).unflatten(-1, (-1, KV_GROUP))
    scales = (groups.abs().amax(-1) / INT8_MAX).bfloat16()
    rounded = scales.float()
    inverse = torch.where(rounded >= torch.finfo(torch.float32).tiny, 1.0 / rounded, 0.0)
    codes = (groups * inverse[..., None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8).flatten(-2)
    padding = codes.new_zeros(*codes.shape[:-1], head_dim % 2)
    return torch.cat((codes[..., :head_dim], padding, scales.view(torch.int8)), -1)


def decode(entries: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Values [..., head_dim] of `dtype` from entries as `encode` makes them."""
    if entries.dtype != torch.int8:
        return entries.to(dtype)
    scales = entries[..., head_dim + head_dim % 2 :].view(torch.bfloat16).float()
    return (entries[..., :head_dim] * scales.repeat_interleave(KV_GROUP, -1)[..., :head_dim]).to(dtype)
