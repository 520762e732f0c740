"""Scales for an fp8 KV cache, as checkpoints have them: one for the keys of a layer and one for the values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch

from tokenspeed.contracts.errors import UnsupportedError, WeightError
from tokenspeed.formats.checkpoint import Checkpoint, TensorInfo
from tokenspeed.quantization.unpack import unpack
from tokenspeed.weights.packed import share_bytes

KV_SCALE_TENSORS = (
    "*.self_attn.[kv]_scale",
    "*.self_attn.kv_scale",
    "*.self_attn.[kv]_proj.[kv]_scale",
    "*.self_attn.attn.[kv]_scale",
    "*.self_attn.q_scale",
)
"""Patterns (fnmatch) of the tensors read here. The last is for queries in fp8, which stay as they are."""
LEAST = 1e-30
"""Of a scale; float32 holds it and its inverse."""
_NAME = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>\d+)\.self_attn\."
    r"(?:(?P<both>kv)|(?:attn\.)?(?P<own>[kv])|(?P<projection>[kv])_proj\.(?P=projection))_scale"
)
_PLAIN = ("F32", "F16", "BF16")


def kv_scales(checkpoint: Checkpoint, layers: int) -> dict[int, tuple[float, float]]:
    """Of keys and of values, by layer; empty where the checkpoint has none. One scale named kv is of both.

    Raises WeightError where only some of the `layers` layers have them, where one comes twice, or for one that is not
    from LEAST to 1 / LEAST; UnsupportedError for more than one number, as scales per head are, and for other types.
    """
    found: dict[tuple[int, str], float] = {}
    for layer, which, info in _scale_tensors(checkpoint):
        for part in which:
            if (layer, part) in found:
                raise WeightError(f"{checkpoint.path}: {info.name!r} is a second {part} scale of layer {layer}")
            found[layer, part] = _number(checkpoint, info)
    if not found:
        return {}
    missing = [f"{part} of layer {layer}" for layer in range(layers) for part in "kv" if (layer, part) not in found]
    if missing:
        more = f", ... ({len(missing)} in all)" if len(missing) > 5 else ""
        raise WeightError(f"{checkpoint.path}: has scales of the KV cache, but none for {', '.join(missing[:5])}{more}")
    return {layer: (found[layer, "k"], found[layer, "v"]) for layer in range(layers)}


def has_kv_scales(checkpoint: Checkpoint) -> bool:
    """Whether there is any, of whatever shape."""
    return any(_scale_tensors(checkpoint))


def _scale_tensors(checkpoint: Checkpoint) -> Iterator[tuple[int, str, TensorInfo]]:
    """Layer, "k", "v" or "kv", and tensor."""
    for name, info in checkpoint.tensors.items():
        match = _NAME.fullmatch(name)
        if match is not None:
            yield int(match["layer"]), match["both"] or match["own"] or match["projection"], info


def _number(checkpoint: Checkpoint, info: TensorInfo) -> float:
    if math.prod(info.shape) != 1 or info.dtype not in _PLAIN:
        raise UnsupportedError(
            f"{checkpoint.path}: {info.name!r} {list(info.shape)} of type {info.dtype}: the KV cache takes one scale "
            f"per layer (supported types: {', '.join(_PLAIN)})"
        )
    data = share_bytes(checkpoint.data(info.name)).clone().unsqueeze(0)
    scale = unpack(data, info.dtype, 1, torch.float32).item()
    if not LEAST <= scale <= 1 / LEAST:
        raise WeightError(f"{checkpoint.path}: {info.name!r} is {scale:g}, no scale ({LEAST:g} to {1 / LEAST:g})")
    return scale
