"""What CUDA offers beyond tensors: graphs, pinned memory and events; and the kernels around the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokenspeed.kernels.triton import attention_tiles, sample, step, work_items
from tokenspeed.kernels.triton.invariant_attention import invariant_item_tokens
from tokenspeed.kernels.triton.launch import small, small_step
from tokenspeed.kernels.triton.mailbox import Mailbox
from tokenspeed.kernels.triton.sampling_state import SamplingState
from tokenspeed.runner.arena import Arena
from tokenspeed.runner.gpu.graphs import CudaDevice

MOST_DECODE_TOKENS = 64
"""Buckets up to this treat every token as a sequence of its own and need no work list."""


class CudaLink:
    """The current CUDA device and stream."""

    def __init__(self) -> None:
        self.recorder = CudaDevice()

    def pinned(self, *shape: int) -> torch.Tensor:
        """Page-locked zeros, int32, which kernels reach by their own address (unified addressing)."""
        return torch.zeros(shape, dtype=torch.int32).pin_memory()

    def staged(self, data: torch.Tensor) -> torch.Tensor:
        """A page-locked copy; torch keeps its memory until the copies that were begun from it are done."""
        return data.pin_memory()

    def mark(self) -> Callable[[], None]:
        """An event after all work given so far."""
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def idle(self) -> bool:
        """Whether the stream has done all its work; raises what went wrong there."""
        return torch.cuda.current_stream().query()


class TritonSteps:
    """The kernels before and after the forward pass. heads: of queries; itemsize: bytes of an activation.
    batch_invariant: one attention kernel takes all tokens, by work items."""

    def __init__(self, heads: int, itemsize: int, batch_invariant: bool = False) -> None:
        self._heads, self._itemsize, self.batch_invariant = heads, itemsize, batch_invariant

    count_tokens = staticmethod(step.count_tokens)

    def prepare(
        self, mailbox: Mailbox, state: torch.Tensor, lengths: step.SlotLengths, tokens: int, rows: int
    ) -> step.StepInputs:
        """Begin the next step."""
        return step.prepare(mailbox, state, lengths, tokens, rows, pdl=small(tokens, state.device))

    def finish(
        self,
        drawn: torch.Tensor,
        inputs: step.StepInputs,
        lengths: step.SlotLengths,
        state: SamplingState,
        mailbox: Mailbox,
    ) -> None:
        """Take in a step's tokens and answer the host."""
        step.finish(drawn, inputs, lengths, state, mailbox, pdl=small_step(drawn))

    def items(
        self, inputs: Any, header: torch.Tensor, arena: Arena, mixed: bool, decodes: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The prefill kernel's work list, and the rows left to the decode kernel; none for small buckets and steps that
        are not mixed, and no such rows where none decodes."""
        tokens, rows, shape = len(inputs.tokens), len(inputs.row_slots), arena.shape
        if self.batch_invariant:
            each = invariant_item_tokens(self._heads, shape.kv_heads)
        elif mixed and tokens > MOST_DECODE_TOKENS:
            each = attention_tiles.item_tokens(self._heads, shape.kv_heads, shape.head_dim, self._itemsize)
        else:
            return None, None
        count = attention_tiles.max_items(tokens, rows, each)
        items = torch.empty((count, 4), dtype=torch.int32, device=header.device)
        apart = decodes and not self.batch_invariant
        decode_rows = torch.empty(rows, dtype=torch.int32, device=header.device) if apart else None
        fed = work_items.StepRows(inputs.row_slots, inputs.row_starts, inputs.row_counts, inputs.row_firsts, header[:1])
        work_items.make_items(fed, tokens, each, items, decode_rows)
        return items, decode_rows

    @staticmethod
    def sample(
        logits: torch.Tensor, inputs: Any, state: SamplingState, pool: torch.Tensor, edits: bool
    ) -> torch.Tensor:
        """A token per row."""
        slots, positions, pdl = inputs.sample_slots, inputs.sample_positions, small_step(logits)
        return sample.sample(logits, slots, positions, state, edits=edits, pool=pool, pdl=pdl)
