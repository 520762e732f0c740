"""Random steps over scattered pages, as the references and as the backends see them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tokenspeed.contracts.step import SamplingRow
from tokenspeed.ops.kv import decode, encode
from tokenspeed.ops.reference import StepView
from tokenspeed.runner.arena import Arena, PageShape
from tokenspeed.runner.inputs import FedRow, Slot, step_view

GREEDY = SamplingRow(temperature=0.0, top_k=0, top_p=1.0, seed=0)
POISON = 0xFF
"""Of every byte: not a number in all float types and in the scales of int8 entries."""


@dataclass(frozen=True)
class Step:
    """Rows fed over an arena of their own, whose entries are random up to the end of each row."""

    name: str
    arena: Arena
    fed: tuple[FedRow, ...]

    @property
    def tokens(self) -> int:
        """That are fed."""
        return sum(row.count for row in self.fed)

    def view(self) -> StepView:
        """As the references see it; the rows whose logits are wanted are all."""
        view = step_view(self.arena, self.fed)
        view.rows = torch.arange(self.tokens, device=self.arena.kv.device)
        return view

    def part(self, starts: Sequence[int], ends: Sequence[int]) -> Step:
        """Of each row the tokens from `starts` to before `ends`, counted as the step feeds them; rows without are left
        out."""
        cut = zip(self.fed, starts, ends, strict=True)
        fed = (replace(row, start=row.start + start, count=end - start) for row, start, end in cut)
        return replace(self, fed=tuple(row for row in fed if row.count))

    def own_entries(self, group: int, index: int) -> torch.Tensor:
        """The keys and values of the tokens fed, of a layer by its place: float64 [T, 2 * kv_heads * head_dim]."""
        pages, offsets = self._own(group)
        stored = self.arena.kv.view(torch.uint8)[pages, index, :, offsets]
        values = decode(stored.view(self.arena.kv.dtype), self.arena.shape.head_dim, torch.float64)
        return values.flatten(1)

    def poison_own(self, group: int, index: int) -> None:
        """Make them no numbers."""
        pages, offsets = self._own(group)
        self.arena.kv.view(torch.uint8)[pages, index, :, offsets] = POISON

    def others_untouched(self, before: torch.Tensor, group: int, index: int) -> bool:
        """Whether all entries but those are as in `before`, bytes of the whole arena."""
        now = self.arena.kv.view(torch.uint8).clone()
        pages, offsets = self._own(group)
        now[pages, index, :, offsets] = before[pages, index, :, offsets]
        return torch.equal(now, before)

    def _own(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots = self.view().slots[group]
        return slots // self.arena.shape.page_size, slots % self.arena.shape.page_size


def random_step(
    name: str, rows: Sequence[tuple[int, int]], shape: PageShape, device: torch.device, vocab: int, rng: random.Random
) -> Step:
    """Rows of (tokens before, tokens fed) of random tokens; pages in random order, poisoned beyond a row's end."""
    lengths = [before + fed for before, fed in rows]
    tokens = [[rng.randrange(vocab) for _ in range(length)] for length in lengths]
    return step_of(name, tokens, [before for before, _ in rows], shape, device, rng)


def step_of(
    name: str,
    tokens: Sequence[Sequence[int]],
    starts: Sequence[int],
    shape: PageShape,
    device: torch.device,
    rng: random.Random,
) -> Step:
    """Rows that feed their tokens from `starts` on."""
    groups = len(shape.layout.windows)
    counts = [-(-len(row) // shape.page_size) for row in tokens]
    free = rng.sample(range(sum(counts) * groups), sum(counts) * groups)
    tables = [[[free.pop() for _ in range(count)] for _ in range(groups)] for count in counts]
    arena = Arena(sum(counts) * groups, shape, device)
    _fill(arena, torch.Generator(device).manual_seed(rng.randrange(1 << 40)))
    for row, mine in zip(tokens, tables, strict=True):
        used = (len(row) - 1) % shape.page_size + 1
        for table in mine:
            arena.kv.view(torch.uint8)[table[-1], :, :, used:] = POISON
    fed = []
    for number, (row, start, mine) in enumerate(zip(tokens, starts, tables, strict=True)):
        slot = Slot(list(row), start, len(row), GREEDY, mine)
        fed.append(FedRow(number, slot, start, len(row) - start, True, len(row) - start))
    return Step(name, arena, tuple(fed))


def _fill(arena: Arena, generator: torch.Generator) -> None:
    size = (*arena.kv.shape[:-1], arena.shape.head_dim)
    for page in range(size[0]):
        values = torch.randn(size[1:], generator=generator, device=arena.kv.device)
        arena.kv.view(torch.uint8)[page] = encode(values, arena.kv.dtype).view(torch.uint8)
