"""What quantising on a device shares: rows some million elements at a time, and refusals."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tokenspeed.contracts.errors import UnsupportedError, WeightError

ELEMENTS = 1 << 24
"""Elements worked on at a time: 64 MiB of float32."""


def parts(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Some rows of [N, K] at a time, float32, with the index of the first."""
    step = max(1, ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield start, weight[start : start + step].float()


def finite(values: torch.Tensor) -> torch.Tensor:
    """The values themselves. Raises WeightError where one is not finite."""
    if not values.isfinite().all():
        raise WeightError("values that are not finite, or too large to be quantised")
    return values


def inverse(step: torch.Tensor) -> torch.Tensor:
    """1 / step, and 0 of 0."""
    return torch.where(step == 0, 0.0, 1.0 / step)


def whole_groups(cols: int, group: int, name: str) -> None:
    """Raise UnsupportedError where columns are no multiple of a group."""
    if cols % group:
        raise UnsupportedError(f"{name} weights have columns in groups of {group}, not {cols}")
