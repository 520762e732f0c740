"""The first and the last work of a step, in torch: the packet becomes tokens and positions, samples become state.

Shapes are fixed by the bucket and nothing waits for the device, so all of it can be captured. These are the plain twins
of the kernels in `kernels.triton`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.runner.draw import DrawRows, draw
from tokenspeed.runner.gpu.state import HEADER, ROW, DeviceState
from tokenspeed.runner.noise import NoiseKeys
from tokenspeed.runner.tiles import tile

_ROUNDS = 10
_STEP_LOW, _STEP_HIGH = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class StepBuffers:
    """Memory of a bucket of T tokens and R rows, int32: what the forward pass reads, then what sampling reads.

    tokens, positions, slots [T]; rows, row_slots, row_positions [R]: the last fed token of each row that samples, its
    slot and the new token's position, -1 for none; fed, starts, firsts [R]: tokens each row fed, where they begin in
    the step, and the first one's position; num_rows [1]; result [R]: the new token, or -1.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    row_slots: torch.Tensor
    row_positions: torch.Tensor
    fed: torch.Tensor
    starts: torch.Tensor
    firsts: torch.Tensor
    num_rows: torch.Tensor
    result: torch.Tensor


def step_buffers(tokens: int, rows: int, device: torch.device) -> StepBuffers:
    """Empty buffers of a bucket."""
    sizes = [tokens] * 3 + [rows] * 6 + [1, rows]
    return StepBuffers(*(torch.zeros(size, dtype=torch.int32, device=device) for size in sizes))


def scatter(packet: torch.Tensor, state: DeviceState, max_rows: int) -> None:
    """Write the packet's (index, value) pairs; those beyond its count say index -1 and go to a word nobody reads."""
    pairs = packet[HEADER + ROW * max_rows :].view(-1, 2)
    state.flat.index_put_((pairs[:, 0].long(),), pairs[:, 1])


def prepare(packet: torch.Tensor, state: DeviceState, buffers: StepBuffers) -> None:
    """Fill a bucket's inputs from the packet's rows and the state as it is on the device."""
    num_tokens, num_rows = len(buffers.tokens), len(buffers.rows)
    table = packet[HEADER : HEADER + ROW * num_rows].view(num_rows, ROW)
    live = torch.arange(num_rows, device=packet.device) < packet[0]
    slot = torch.where(live, table[:, 0], 0).long()
    start, known = state["num_computed"][slot], state["num_tokens"][slot]
    count = torch.where(live, torch.minimum(table[:, 1], known - start), 0)
    offset = torch.where(live, table[:, 2], num_tokens)
    at = torch.arange(num_tokens, device=packet.device, dtype=torch.int32)
    row = (torch.searchsorted(offset.contiguous(), at, right=True) - 1).clamp(min=0)
    inside = at - offset[row]
    fed = (inside >= 0) & (inside < count[row])
    position = torch.where(fed, start[row] + inside, 0)
    buffers.positions.copy_(position)
    buffers.slots.copy_(torch.where(fed, slot[row], -1))
    buffers.tokens.copy_(torch.where(fed, state.pool[slot[row], position.long()], 0))
    samples = live & (count > 0) & (start + count == known)
    buffers.rows.copy_(torch.where(samples, offset + count - 1, -1))
    buffers.row_slots.copy_(torch.where(live, slot, -1))
    buffers.row_positions.copy_(torch.where(samples, known, -1))
    buffers.fed.copy_(count)
    buffers.starts.copy_(torch.where(live, offset, 0))
    buffers.firsts.copy_(torch.where(live, start, 0))
    buffers.num_rows.copy_(packet[:1])


def sample(logits: torch.Tensor, state: DeviceState, buffers: StepBuffers) -> torch.Tensor:
    """Token of each row, int32 [R], of float32 logits [R, vocabulary]: greedy, or drawn by the slot's parameters."""
    slot = buffers.row_slots.clamp(min=0).long()
    temperature = state["temperature"][slot][:, None]
    warm = torch.where(temperature > 0, temperature, 1.0)
    rows = DrawRows(
        temperature=warm,
        log_min_p=state["min_p"][slot][:, None].log(),
        top_k=state["top_k"][slot][:, None].long(),
        top_p=state["top_p"][slot][:, None].double(),
        keys=_keys(state, slot, buffers.row_positions),
        max_top_k=logits.shape[1],
        any_top_p=True,
    )
    drawn = draw(logits, rows, narrow=False)
    return torch.where(temperature[:, 0] > 0, drawn, tile(logits).first_argmax()).int()


def _keys(state: DeviceState, slot: torch.Tensor, positions: torch.Tensor) -> NoiseKeys:
    seed = torch.stack((state["seed_low"][slot], state["seed_high"][slot])).long() & _WORD
    step = torch.tensor([[_STEP_LOW], [_STEP_HIGH]], device=slot.device)
    rounds = torch.stack([(seed + i * step) & _WORD for i in range(_ROUNDS)])
    samples = state["sample_index"][slot].long()[:, None] & _WORD
    return NoiseKeys(rounds[..., None], samples, positions.long()[:, None] & _WORD)


def finish(tokens: torch.Tensor, state: DeviceState, buffers: StepBuffers) -> None:
    """Append sampled tokens to the pool, move the lengths on, and leave the result for the host."""
    live = buffers.row_slots >= 0
    samples = buffers.rows >= 0
    slot = torch.where(live, buffers.row_slots, 0).long()
    state["num_computed"].index_add_(0, slot, torch.where(live, buffers.fed, 0))
    last = state.pool.shape[1] - 1  # a word of each slot that no token takes
    place = torch.where(samples, buffers.row_positions, last).long()
    state.pool[slot, place] = torch.where(samples, tokens, 0)
    state["num_tokens"].index_add_(0, slot, samples.int())
    buffers.result.copy_(torch.where(samples, tokens, -1))
