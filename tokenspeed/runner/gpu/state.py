"""All device state of a runner's sequences, in one flat int32 tensor that a packet changes before each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEADER = 4
"""Words before the rows: rows, pairs, two unused."""
ROW = 4
"""Words of a row: slot, most tokens, offset in the step, reserved positions."""


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


FIELDS = (
    "num_computed",
    "num_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed_low",
    "seed_high",
    "sample_index",
)
"""One word per slot each, after the block tables; floats by their bits."""
FLOATS = ("temperature", "top_p", "min_p")


class DeviceState:
    """Views of `flat`, int32: block_tables [groups, slots, pages], and a [slots] tensor per field; its last word takes
    what goes nowhere. `pool`: known tokens, int32 [slots, length + 1]; the device appends what it samples.
    """

    def __init__(self, shape: StateShape, device: torch.device) -> None:
        self.shape = shape
        self.flat = torch.zeros(shape.tables + len(FIELDS) * shape.slots + 1, dtype=torch.int32, device=device)
        self.block_tables = self.flat[: shape.tables].view(shape.groups, shape.slots, shape.pages)
        self.pool = torch.zeros(shape.slots, shape.length + 1, dtype=torch.int32, device=device)
        self._fields = {name: self._field(i, name) for i, name in enumerate(FIELDS)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._fields[name]

    def table_word(self, group: int, slot: int, entry: int) -> int:
        """Index into `flat` of a block table entry."""
        return (group * self.shape.slots + slot) * self.shape.pages + entry

    def field_word(self, name: str, slot: int) -> int:
        """Index into `flat` of a slot's field."""
        return self.shape.tables + FIELDS.index(name) * self.shape.slots + slot

    def _field(self, i: int, name: str) -> torch.Tensor:
        start = self.shape.tables + i * self.shape.slots
        words = self.flat[start : start + self.shape.slots]
        return words.view(torch.float32) if name in FLOATS else words
