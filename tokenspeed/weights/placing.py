"""A model's weights on the device that computes with them: plain ones by readers, quantised ones unpacked there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import torch

from tokenspeed.weights.packed import Weight
from tokenspeed.weights.reading import read_to
from tokenspeed.weights.stored import is_stored, unpack_stored
from tokenspeed.weights.unpacked import unpack_all

Progress = Callable[[int, int], None] | None


def place_weights(
    weights: Mapping[str, Weight], dtype: torch.dtype, device: torch.device, progress: Progress = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight by its name on `device`: matrices in `dtype`, vectors in float32, of their shapes.

    On a GPU weights to come are being read meanwhile. progress: packed bytes done and in all. Raises FormatError where
    a file changes meanwhile.
    """
    if device.type == "cpu":
        return iter(unpack_all(weights, dtype, progress).items())
    stored = {name: weight for name, weight in weights.items() if is_stored(weight)}
    plain = {name: weight for name, weight in weights.items() if name not in stored}
    total, first = (sum(weight.nbytes for weight in each.values()) for each in (weights, plain))
    unpacked = unpack_stored(stored, dtype, device, share(progress, first, total))
    return chain(read_to(device, plain, dtype, share(progress, 0, total)), unpacked)


def share(progress: Progress, before: int, total: int) -> Progress:
    """A `progress` for a part of a load, which begins when `before` bytes of `total` are done."""
    return None if progress is None else lambda done, _: progress(before + done, total)
