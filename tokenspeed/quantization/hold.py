"""From a matrix's codes as files have them to the narrow type that holds exactly their values, where there is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenspeed.formats.quantized.layout import Grid
from tokenspeed.quantization.codes import NIBBLE_ZERO, Codes
from tokenspeed.quantization.fp8 import BLOCK, Fp8Weight
from tokenspeed.quantization.int4 import GROUP, GROUPS, int4_weight
from tokenspeed.quantization.int8 import Int8Weight
from tokenspeed.quantization.narrow import NarrowWeight


def held_mode(grid: Grid | None, cols: int) -> str:
    """The mode (a key of `narrow.FORMATS`) whose type holds rows of such codes exactly, empty where none does."""
    if grid is None:
        return ""
    whole = grid.across in (0, cols)
    if grid.codes == "fp8":
        return "fp8" if (grid.down, grid.across) == (BLOCK, BLOCK) or (whole and grid.down < 2) else ""
    if grid.codes == "int8":
        return "int8" if whole and not grid.zeros else ""
    known = whole or grid.across in GROUPS or grid.across % GROUP == 0
    return "int4" if known and cols % GROUP == 0 else ""


def hold(parts: Sequence[Codes]) -> NarrowWeight:
    """Parts of one `held_mode`, rows of one after the other, as one weight on their device. Of parts with scales
    per block all but the last have whole blocks of rows."""
    first = parts[0].codes.dtype
    if first == torch.float8_e4m3fn:
        return _fp8(parts)
    rows = [part.by_row() for part in parts]
    codes, scale = torch.cat([part.codes for part in rows]), [part.scale for part in rows]
    if first == torch.int8:
        return Int8Weight(codes, torch.cat([each.float() for each in scale])[:, 0].contiguous())
    group = min(GROUP, *(part.block[1] for part in rows))
    groups = codes.shape[1] // group
    zero = None
    if any(part.zero is not None for part in rows):
        zero = torch.cat([_spread(_zero(part), groups) for part in rows])
    return int4_weight(codes, torch.cat([_spread(each, groups) for each in _one_type(scale)]), zero)


def _fp8(parts: Sequence[Codes]) -> Fp8Weight:
    q = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    if parts[0].block == (BLOCK, BLOCK):
        return Fp8Weight(q, torch.cat([part.scale.float() for part in parts]))
    return Fp8Weight(q, torch.cat([part.by_row().scale.float() for part in parts])[:, 0].contiguous())


def _zero(part: Codes) -> torch.Tensor:
    if part.zero is not None:
        return part.zero
    return torch.full(part.scale.shape, NIBBLE_ZERO, dtype=torch.uint8, device=part.scale.device)


def _spread(factors: torch.Tensor, groups: int) -> torch.Tensor:
    """Factors [N, coarser groups] for each of `groups`."""
    return factors.repeat_interleave(groups // factors.shape[1], 1)


def _one_type(scales: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The scales in their own type, or in float32 where they have several."""
    alike = len({each.dtype for each in scales}) == 1
    return [each if alike else each.float() for each in scales]
