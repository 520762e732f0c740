"""What the kernels of a step see besides activations: device memory at fixed addresses, filled before each step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokenspeed.kernels.triton.view import Reach


@dataclass(frozen=True)
class GpuView:
    """Inputs of a bucket of T tokens and R rows; padding has slot -1.

    tokens, positions, slots: int32 [T]. rows: int32 [R], the token whose logits each row wants, -1 for none.
    block_tables: int32 [groups, slots, pages of a sequence]; entries before a group's window may be stale.
    kv: the arena. places: per layer its page group and its index in it.
    items: int32 [N, 4], pieces of prompts: slot, first token in the step, tokens, first position; slot -1 for none.
    decode_rows: int32 [R], the only token of rows that feed one, in steps with items; -1 for none.
    one_each: whether every row feeds one token at most, row i the i-th.
    reach: of the sequences, where every row feeds one token.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    block_tables: torch.Tensor
    kv: torch.Tensor
    places: tuple[tuple[int, int], ...]
    page_size: int
    num_kv_heads: int
    head_dim: int
    items: torch.Tensor | None = None
    decode_rows: torch.Tensor | None = None
    one_each: bool = False
    reach: Reach = Reach.UNEVEN

    def asking(self, rows: torch.Tensor) -> GpuView:
        """The same step, with logits of other tokens."""
        return replace(self, rows=rows)
