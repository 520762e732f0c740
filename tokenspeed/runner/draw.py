"""One token per row by Gumbel-max: divide by T, min_p, top_k, top_p, then the argmax with noise.

Every filter is a lower bound on a row's scaled logits, so ties with the last token that a filter keeps stay.
Probability mass is counted in integers: sums do not depend on their order, hence tokens not on the batch, its order or
the device's way of adding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.runner.noise import HIGHEST_NOISE, LOWEST_NOISE, TOKENS_PER_BLOCK, NoiseKeys, gumbel
from tokenspeed.runner.tiles import Tiles, tile

_REACH = HIGHEST_NOISE - LOWEST_NOISE + 0.3
"""A token this far below the best cannot win; the last term covers float32 rounding of scaled logits."""
_MASS_BITS = 42
"""The best token of a row weighs 2^42: 2^20 tokens fit into 63 bits, and rounding costs less than 2^-22 of the sum."""
_HEADS = (1024, 16384)
"""How many of the largest tokens are sorted to find where top_p ends, before all are."""


@dataclass(frozen=True)
class DrawRows:
    """Parameters of rows that draw, on the device, each [rows, 1]: temperature and log_min_p (float32, -inf is none),
    top_k (int64, 0 is none), top_p (float64, 1 is none). `max_top_k` and `any_top_p` are known to the host."""

    temperature: torch.Tensor
    log_min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    keys: NoiseKeys
    max_top_k: int
    any_top_p: bool


def draw(logits: torch.Tensor, rows: DrawRows, narrow: bool) -> torch.Tensor:
    """Token ids int64 [rows] from float32 logits [rows, vocabulary].

    narrow: look at what is left after each filter and go on with that alone, which waits for the device; without it
    every size is known beforehand. The tokens are the same.
    """
    tiles = tile(logits)
    floor = _min_p_and_top_k_floor(tiles, rows)
    if not rows.any_top_p:
        floor = torch.maximum(floor, _reach_floor(tiles, rows))
    tiles = _narrowed(tiles, rows, floor) if narrow else tiles
    if rows.any_top_p:
        floor = torch.where(rows.top_p < 1, _top_p_floor(tiles, rows, floor, narrow), floor)
        floor = torch.maximum(floor, _reach_floor(tiles, rows))
        tiles = _narrowed(tiles, rows, floor) if narrow else tiles
    return _noisy_argmax(tiles, rows, floor)


def _min_p_and_top_k_floor(tiles: Tiles, rows: DrawRows) -> torch.Tensor:
    best = tiles.maxima.amax(-1, keepdim=True) / rows.temperature
    floor = (best + rows.log_min_p).clamp(min=torch.finfo(torch.float32).min)  # never as low as a forbidden token
    if rows.max_top_k:
        largest = tiles.top_values(rows.max_top_k)
        at = (rows.top_k - 1).clamp(min=0, max=largest.shape[1] - 1)
        kth = largest.gather(1, at) / rows.temperature
        floor = torch.where(rows.top_k > 0, torch.maximum(floor, kth), floor)
    return floor


def _reach_floor(tiles: Tiles, rows: DrawRows) -> torch.Tensor:
    return tiles.maxima.amax(-1, keepdim=True) / rows.temperature - _REACH


def _narrowed(tiles: Tiles, rows: DrawRows, floor: torch.Tensor) -> Tiles:
    """What is left above the floor: wide tiles, and where these are few, tiles as wide as a block of noise."""
    all_tiles = tiles.maxima.shape[1]
    tiles = tiles.narrow(tiles.maxima / rows.temperature >= floor)
    if tiles.values.shape[2] == TOKENS_PER_BLOCK or 4 * tiles.maxima.shape[1] > all_tiles:
        return tiles
    tiles = tiles.split(TOKENS_PER_BLOCK)
    return tiles.narrow(tiles.maxima / rows.temperature >= floor)


def _top_p_floor(tiles: Tiles, rows: DrawRows, floor: torch.Tensor, narrow: bool) -> torch.Tensor:
    """The smallest value of the smallest set of largest values, none under `floor`, whose mass reaches top_p. Rows
    without top_p get a value of no meaning."""
    scaled = tiles.flat() / rows.temperature
    best = scaled.amax(-1, keepdim=True)
    wanted = rows.top_p * _mass(scaled, best, floor).sum(-1, keepdim=True).double()
    wanted.masked_fill_(rows.top_p >= 1, 0.0)
    for size in _HEADS if narrow else ():
        if size < scaled.shape[1]:
            head = tiles.top_values(size) / rows.temperature
            mass = _mass(head, best, floor)
            if bool((mass.sum(-1, keepdim=True).double() >= wanted).all()):
                return _last_before(head, mass, wanted)
    ordered = scaled.sort(descending=True).values
    return _last_before(ordered, _mass(ordered, best, floor), wanted)


def _last_before(ordered: torch.Tensor, mass: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The last of descending values [rows, n] before which less than `wanted` has been collected."""
    before = mass.cumsum(-1) - mass
    count = (before.double() < wanted).sum(-1, keepdim=True)
    return ordered.gather(1, (count - 1).clamp_(min=0))


def _mass(scaled: torch.Tensor, best: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """exp(scaled - best) as int64 of _MASS_BITS, 0 under `floor`."""
    weights = (scaled - best).exp_().mul_(2.0**_MASS_BITS).masked_fill_(scaled < floor, 0.0)
    return weights.to(torch.int64)


def _noisy_argmax(tiles: Tiles, rows: DrawRows, floor: torch.Tensor) -> torch.Tensor:
    """The lowest id among equals wins."""
    blocks = tiles.split(TOKENS_PER_BLOCK) if tiles.values.shape[2] > TOKENS_PER_BLOCK else tiles
    scaled = blocks.flat() / rows.temperature
    noisy = gumbel(rows.keys, blocks.numbers).add_(scaled).masked_fill_(scaled < floor, -torch.inf)
    values = noisy.view(blocks.values.shape)
    return Tiles(values, blocks.numbers, values.amax(-1)).first_argmax()
