"""What the paged kernels read of a step."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Protocol

import torch

from tokenspeed.ops.definitions import Attrs


class RecordView(Protocol):
    """What an implementation reads of a record (`program.Record`): of a fused one, the parts it stands for."""

    @property
    def op(self) -> str: ...
    @property
    def attrs(self) -> Attrs: ...
    def plain(self) -> Iterable[RecordView]: ...


class Reach(IntEnum):
    """How long a decode step's sequences are: of much different length or too long; of much the same; that, but each so
    long that it wants many programs."""

    UNEVEN = 0
    NEAR = 1
    FAR = 2


class PagedView(Protocol):
    """A step of T tokens (a bucket's size), on the device; its lengths and work lists are read there.

    positions: int32 [T]. slots: int32 [T], the sequence slot of each token; -1 marks padding.
    block_tables: int32 [groups, slots, pages]; entries behind a group's window may be stale or -1.
    kv: [pages, layers per group, 2, page_size, kv_heads, head_dim]; index 2 is key, value.
    places: per layer its page group and its index in it.
    items: int32 [n, 4], the prefill kernel's work list (`work_items`); needed above 64 tokens.
    decode_rows: int32 [n], tokens that the decode kernel takes in a step with items, -1 for none; None where all
        tokens are in items.
    reach: of the sequences, where every row feeds one token.
    """

    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def slots(self) -> torch.Tensor: ...
    @property
    def block_tables(self) -> torch.Tensor: ...
    @property
    def kv(self) -> torch.Tensor: ...
    @property
    def places(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def page_size(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def items(self) -> torch.Tensor | None: ...
    @property
    def decode_rows(self) -> torch.Tensor | None: ...
    @property
    def reach(self) -> Reach: ...
