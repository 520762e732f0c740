"""Experts that a file holds in MXFP4, as a GPU's kernels read them: codes and scales are moved, nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.formats.blocks import BLOCKS
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts, empty_experts, put_expert
from tokenspeed.weights.packed import Weight

STORED = "MXFP4"
"""Blocks of an exponent and 16 bytes, whose low halves are the first 16 codes."""


def packed_experts(weights: Mapping[str, Weight]) -> frozenset[str]:
    """The weights of all experts by name, where all of them are stored so; else none."""
    experts = {name: weight for name, weight in weights.items() if weight.spec.kind == "experts"}
    return frozenset(experts) if all(weight.formats == (STORED,) for weight in experts.values()) else frozenset()


def load_experts(weight: Weight, device: torch.device) -> Mxfp4Experts:
    """On the device, expert by expert. Raises UnsupportedError naming the weight for scales beyond what it can hold."""
    experts, rows, cols = weight.shape
    made = empty_experts(experts, rows, cols, device)
    for expert in range(experts):
        blocks = _rows(weight, expert * rows, (expert + 1) * rows, device).view(rows, -1, BLOCKS[STORED][1])
        halves = blocks[..., 1:]
        codes = torch.cat((halves & 15, halves >> 4), dim=2).flatten(1)
        try:
            put_expert(made, expert, codes, blocks[..., 0])
        except UnsupportedError as error:
            raise UnsupportedError(f"weight {weight.spec.name}: {error}") from None
    return made


def _rows(weight: Weight, first: int, last: int, device: torch.device) -> torch.Tensor:
    """Rows [first, last) of all segments, on the device; the file's pages behind them are given back."""
    found, start = [], 0
    for segment in weight.segments:
        begin, end = max(first - start, 0), min(last - start, segment.rows)
        if begin < end:
            found.append(segment.rows_at(begin, end).to(device, copy=True))
            if not segment.heads:  # a moved row may lie in another's part
                segment.drop_pages(begin, end)
        start += segment.rows
    return torch.cat(found)
