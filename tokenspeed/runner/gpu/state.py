"""All device state of a runner's sequences, in one flat int32 tensor that a header changes before each step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tokenspeed.contracts.step import NewSequence
from tokenspeed.kernels.triton.sampling_state import SamplingState, slot_entries
from tokenspeed.kernels.triton.step import SlotLengths


@dataclass(frozen=True)
class StateShape:
    """slots: most sequences. groups: page groups. pages: most of one sequence. length: most tokens of one."""

    slots: int
    groups: int
    pages: int
    length: int

    @property
    def tables(self) -> int:
        """Words of all block tables."""
        return self.groups * self.slots * self.pages


class DeviceState:
    """Views of `flat`, int32: block_tables [groups, slots, pages], `lengths`, and `sampling`."""

    def __init__(self, shape: StateShape, device: torch.device) -> None:
        self.shape = shape
        tables, slots = shape.tables, shape.slots
        self.flat = torch.zeros(tables + 2 * slots + SamplingState.size(slots), dtype=torch.int32, device=device)
        self.block_tables = self.flat[:tables].view(shape.groups, slots, shape.pages)
        computed, known = self.flat[tables : tables + 2 * slots].view(2, slots)
        pool = torch.zeros(slots, shape.length + 1, dtype=torch.int32, device=device)
        self.lengths = SlotLengths(computed, known, pool)
        self.sampling = SamplingState.over(self.flat[tables + 2 * slots :], slots)

    def table_entries(self, group: int, slot: int, first: int, pages: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Indices into `flat` and values, int32 [n] each, of a run of a block table."""
        start = (group * self.shape.slots + slot) * self.shape.pages + first
        return np.arange(start, start + len(pages), dtype=np.int32), np.array(pages, dtype=np.int32)

    def sequence_entries(self, new: NewSequence) -> tuple[np.ndarray, np.ndarray]:
        """The same of a sequence that enters a slot: its lengths and its sampling."""
        tables, slots = self.shape.tables, self.shape.slots
        indices, values = slot_entries(new.slot, slots, new.sampling, new.num_prompt)
        at = np.array([tables + new.slot, tables + slots + new.slot], dtype=np.int32)
        lengths = np.array([new.num_computed, len(new.token_ids)], dtype=np.int32)
        return np.concatenate((at, indices + (tables + 2 * slots))), np.concatenate((lengths, values))
