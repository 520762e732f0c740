"""Which quantised matrices of a checkpoint a GPU's kernels take as they are, and those in their types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from tokenspeed.quantization.fp8 import BLOCK, Fp8Weight
from tokenspeed.quantization.hold import held_mode, hold
from tokenspeed.quantization.narrow import NarrowWeight
from tokenspeed.weights.ahead import brought
from tokenspeed.weights.packed import PackedTensor, Weight
from tokenspeed.weights.stored import StoredRows

_GATE_UP, _DOWN = "experts_gate_up", "experts_down"


def held_modes(weights: Mapping[str, Weight], head: str) -> dict[str, str]:
    """The mode (a key of `narrow.FORMATS`) of each weight that a narrow type holds exactly. All others are unpacked:
    the head, embeddings and routers, experts that are not fp8, parts that do not fit each other.

    Gate and up of experts are held only beside a down of the same kind.
    """
    modes = {name: mode for name, weight in weights.items() if name != head and (mode := _mode(weight))}
    for name in list(modes):
        if name.endswith(_GATE_UP):
            down = name.removesuffix(_GATE_UP) + _DOWN
            if down not in modes or _is_block(weights[name]) != _is_block(weights[down]):
                modes.pop(name), modes.pop(down, None)
    return {name: mode for name, mode in modes.items() if not name.endswith(_DOWN) or _gate_of(name) in modes}


def _gate_of(down: str) -> str:
    return down.removesuffix(_DOWN) + _GATE_UP


def _mode(weight: Weight) -> str:
    rows = weight.segments
    found = {_mode_of(segment) for segment in rows}
    if len(found) != 1 or weight.spec.kind not in ("linear", "experts"):
        return ""
    (mode,) = found
    if weight.spec.kind == "experts" and mode != "fp8":
        return ""
    blocks = [_block_of(segment) for segment in rows]
    if any(blocks) and not (all(blocks) and _joins(weight)):
        return ""
    return mode


def _mode_of(rows: PackedTensor) -> str:
    if not isinstance(rows, StoredRows):
        return ""
    return held_mode(rows.layout.grid, rows.cols)


def _block_of(rows: PackedTensor) -> bool:
    """Whether rows share scales in blocks."""
    return isinstance(rows, StoredRows) and rows.layout.grid is not None and rows.layout.grid.down > 1


def _is_block(weight: Weight) -> bool:
    return _block_of(weight.segments[0])


def _joins(weight: Weight) -> bool:
    """Whether blocks of rows stay whole where parts meet, in each expert's matrix for itself."""
    size = weight.shape[-2]
    start = 0
    for segment in weight.segments:
        if segment.heads or start % size % BLOCK or start % size + segment.rows > size:
            return False
        start += segment.rows
    return True


def hold_weights(
    weights: Mapping[str, Weight], device: torch.device, progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[str, NarrowWeight]]:
    """Weights of `held_modes` by name, on `device`. progress: bytes done and in all."""
    total, done = sum(weight.nbytes for weight in weights.values()), 0
    for name, weight in brought(weights, device):
        yield name, hold_weight(weight, device)
        for segment in weight.segments:
            segment.drop_pages(0, segment.rows)
        done += weight.nbytes
        if progress is not None:
            progress(done, total)


def hold_weight(weight: Weight, device: torch.device) -> NarrowWeight:
    """A weight of `held_modes` in its type, on `device`: [rows, cols], or of experts [experts, rows, cols]. Raises
    UnsupportedError naming a matrix whose values its layout cannot tell."""
    parts = [segment.codes(device=device) for segment in weight.segments if isinstance(segment, StoredRows)]
    made = hold(parts)
    if weight.spec.kind != "experts":
        return made
    assert isinstance(made, Fp8Weight)
    scale = made.scale.unflatten(0, (weight.shape[0], -1))
    return Fp8Weight(made.q.view(torch.uint8).view(weight.shape).view(torch.float8_e4m3fn), scale)
