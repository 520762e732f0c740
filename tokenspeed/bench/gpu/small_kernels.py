"""Launches each kernel once or twice at small odd shapes: what a sanitizer watches. `python -m
tokenspeed.bench.gpu.small_kernels [GROUP ...]` ends with 1 where a result is not finite."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import torch

from tokenspeed.bench.gpu.paged_steps import paged_step
from tokenspeed.bench.gpu.sample import HISTORY, KINDS, state_of
from tokenspeed.bench.gpu.sample import around as step_around
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.step import SamplingRow
from tokenspeed.kernels.cuda.attend import attend
from tokenspeed.kernels.cuda.dense_tall import tall_rows
from tokenspeed.kernels.cuda.experts import stream_experts
from tokenspeed.kernels.cuda.experts_packed import stream_packed
from tokenspeed.kernels.cuda.experts_tall import multiply_experts
from tokenspeed.kernels.cuda.prefill import prefill
from tokenspeed.kernels.cuda.registration import hopper
from tokenspeed.kernels.cuda.router import route_rows as cuda_route_rows
from tokenspeed.kernels.cuda.stream import stream, stream_rows
from tokenspeed.kernels.cuda.stream_tiles import LONG_ROW
from tokenspeed.kernels.triton import norm as row_kernels
from tokenspeed.kernels.triton.attention_tiles import decode_tile, item_tokens, pad, prefill_tile
from tokenspeed.kernels.triton.decode_attention import decode_attention
from tokenspeed.kernels.triton.expert_operands import Experts
from tokenspeed.kernels.triton.experts import experts_by_choice, experts_in_blocks
from tokenspeed.kernels.triton.launch import small_step
from tokenspeed.kernels.triton.linear import gemv, skinny
from tokenspeed.kernels.triton.operands import Norm, Prologue, Rows
from tokenspeed.kernels.triton.packed_experts import packed_by_choice, packed_in_blocks
from tokenspeed.kernels.triton.packed_linear import packed_product, plain
from tokenspeed.kernels.triton.paged import Heads
from tokenspeed.kernels.triton.prefill_attention import prefill_attention
from tokenspeed.kernels.triton.rope_write import rope_write
from tokenspeed.kernels.triton.route import route
from tokenspeed.kernels.triton.router import Routed, route_rows
from tokenspeed.kernels.triton.sample import sample
from tokenspeed.kernels.triton.sampling_state import is_edited
from tokenspeed.ops.rope import Rope
from tokenspeed.quantization.fp8 import quantize_fp8, quantize_rows
from tokenspeed.quantization.groups import GPU_MODES
from tokenspeed.quantization.mxfp4_experts import quantize_experts
from tokenspeed.quantization.narrow import NarrowWeight, PackedWeight, narrow

HEADS = Heads(6, 2, 80, 80**-0.5, 0)
WINDOWED = Heads(4, 1, 64, 0.125, 19)
PAGE = 16
CUDA_HEADS = Heads(8, 2, 64, 0.125, 0)
WIDTH, OUT, STREAMED = 208, 90, 2048
VOCAB = 1237
Results = list[torch.Tensor]
T = TypeVar("T")


def _narrow(w: torch.Tensor, mode: str) -> NarrowWeight:
    made = narrow(w, mode, "w")
    assert isinstance(made, NarrowWeight)
    return made


def _values(device: str, *size: int) -> torch.Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(sum(size))) / 8).to(device, _dtype(device))


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def gemvs(device: str) -> Results:
    """One and three rows, plain and with a join, a norm and an activation around."""
    x, w = _values(device, 3, WIDTH), _values(device, OUT, WIDTH)
    prologue = Prologue(Norm(torch.ones(WIDTH, device=device), 1e-5), _values(device, 3, WIDTH))
    joined = gemv(x, w, None, "silu", prologue)
    return [gemv(x[:1], w)[0], gemv(x[:1], quantize_fp8(w))[0], joined[0], *([] if joined[1] is None else [joined[1]])]


def skinnies(device: str) -> Results:
    """Five rows, plain and in fp8."""
    x, w = _values(device, 5, WIDTH), _values(device, OUT, WIDTH)
    rows, quantized = row_kernels.norm_rows(x, None)[0], row_kernels.norm_rows(x, None, quantize=True)[0]
    return [skinny(rows, w, x.dtype), skinny(quantized, quantize_fp8(w), x.dtype, None, "gelu_tanh")]


def packed(device: str) -> Results:
    """Five rows by codes, and the values of those."""
    found = []
    for mode, width in (("int8", WIDTH), ("int4", 256), ("mxfp4", 224)):
        w = narrow(_values(device, OUT, width), mode, "w")
        assert isinstance(w, PackedWeight)
        x = _values(device, 5, width)
        found += [packed_product(x, w, None, "silu"), packed_product(x[:1], w), plain(w, x.dtype)]
    return found


def norms(device: str) -> Results:
    """Rows with a branch, quantised rows, heads, sums, activations and rows of a table."""
    x, branch = _values(device, 3, WIDTH), _values(device, 3, WIDTH)
    norm, head = Norm(torch.ones(WIDTH, device=device), 1e-5), Norm(torch.ones(WIDTH // 4, device=device), 1e-5)
    rows, joined = row_kernels.norm_rows(x, norm, branch, norm)
    quantized = row_kernels.norm_rows(x, norm, quantize=True)[0]
    ids = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    some = [rows.values, quantized.values.float(), row_kernels.norm_heads(x, head), row_kernels.add_rows(x, branch)]
    some += [row_kernels.act_mul(x, "silu"), row_kernels.embed_rows(ids, branch, 1.5)]
    return some if joined is None else [*some, joined]


def writes(device: str) -> Results:
    """Keys and values of a prompt's end and of a decoding row."""
    step = paged_step([(13, 7), (32, 1)], HEADS, PAGE, _dtype(device), 1, device)
    size = HEADS.kv_heads * HEADS.head_dim
    qkv = _values(device, 8, (HEADS.group + 2) * size)
    q, k, v = qkv.split([HEADS.group * size, size, size], dim=-1)
    return [rope_write(q, k, v, step.layer(0), Rope(1e4, HEADS.head_dim), pdl=small_step(q))]


def decodes(device: str) -> Results:
    """Rows at the start, in the middle of a page, and over several splits; one with a window."""
    found = []
    for heads, rows in ((HEADS, [(0, 1), (145, 1)]), (WINDOWED, [(45, 1)])):
        step = paged_step(rows, heads, PAGE, _dtype(device), 1, device)
        q = _values(device, len(rows), heads.heads * heads.head_dim)
        tile = decode_tile(len(rows), heads.kv_heads, heads.head_dim, q.element_size())
        found.append(decode_attention(q, step.layer(0), heads, tile, pdl=small_step(q)))
    return found


def prefills(device: str) -> Results:
    """A prompt's end and a decoding row in one step."""
    step = paged_step([(5, 37), (60, 1)], HEADS, PAGE, _dtype(device), 1, device)
    q = _values(device, 38, HEADS.heads * HEADS.head_dim)
    tile = prefill_tile(HEADS.head_dim, q.element_size())
    items, alone = step.items(tile.rows // pad(HEADS.group), decode_rows=True)
    out = prefill_attention(q, step.layer(0), items, HEADS, tile)
    few = decode_tile(2, HEADS.kv_heads, HEADS.head_dim, q.element_size())
    return [decode_attention(q, step.layer(0), HEADS, few, rows=alone, out=out)]


def streams(device: str) -> Results:
    """The CUDA projections: one row, plain, by narrow weights and with all around; three, also by two programs, and in
    e4m3, quantised before or inside; twenty by warpgroup products."""
    x, w = _values(device, 3, STREAMED), _values(device, OUT, STREAMED)
    prologue = Prologue(Norm(torch.ones(STREAMED, device=device), 1e-5), x[1:2])
    weights = [w, *(_narrow(w, mode) for mode in GPU_MODES)]
    found = [*(stream(x[:1], each) for each in weights), stream(x[:1], w, None, "silu", prologue)]
    long, wide = _values(device, 3, LONG_ROW), _values(device, OUT, LONG_ROW)
    several = [stream_rows(Rows(x), w), stream_rows(Rows(long), wide)]
    several += [stream_rows(rows, quantize_fp8(w)) for rows in (Rows(x), Rows(*quantize_rows(x)))]
    tall = _values(device, 20, STREAMED)
    several += [tall_rows(Rows(tall), w), tall_rows(Rows(*quantize_rows(tall)), quantize_fp8(w))] if hopper() else []
    return [*(each[0] for each in _taken(found)), *_taken(several)]


def attends(device: str) -> Results:
    """The CUDA kernels of attention: two decoding rows, one long, in clusters and by programs without; a prompt's end
    and a decoding row."""
    step = paged_step([(0, 1), (700, 1)], CUDA_HEADS, PAGE, _dtype(device), 1, device)
    size = CUDA_HEADS.kv_heads * CUDA_HEADS.head_dim
    q, k, v = _values(device, 2, (CUDA_HEADS.group + 2) * size).split([CUDA_HEADS.group * size, size, size], dim=-1)
    rope = Rope(1e4, CUDA_HEADS.head_dim)
    found = [attend(q, k, v, step.layer(0), rope, CUDA_HEADS, far=far) for far in (False, True)]
    step = paged_step([(5, 67), (160, 1)], CUDA_HEADS, PAGE, _dtype(device), 1, device)
    items = step.items(item_tokens(CUDA_HEADS.heads, CUDA_HEADS.kv_heads, CUDA_HEADS.head_dim, 2))[0]
    queries = _values(device, 68, CUDA_HEADS.group * size)
    return _taken([*found, prefill(queries, step.layer(0), items, CUDA_HEADS)])


def streamed_experts(device: str) -> Results:
    """The CUDA kernels of experts: one token, five that share experts, one of them padding, of bf16, e4m3 and MXFP4."""
    number, hidden, ff = 6, 512, 128
    gate_up, down = _values(device, number, 2 * ff, hidden), _values(device, number, hidden, ff)
    x, shares = _values(device, 5, hidden), torch.rand(5, 2, device=device)
    ids = torch.arange(10, dtype=torch.int32, device=device).view(5, 2) % number
    ids[4] = -1
    several = [Experts(gate_up, down, "silu"), Experts(quantize_fp8(gate_up), quantize_fp8(down), "gelu_tanh")]
    packed = Experts(quantize_experts(gate_up), quantize_experts(down), "swiglu_clamped", alpha=1.702, limit=7.0)
    found = [stream_packed(x[:n], ids[:n], shares[:n], packed) for n in (1, 5)]
    runs = (stream_experts, multiply_experts) if hopper() else (stream_experts,)
    return _taken(
        [*found, *(run(x[:n], ids[:n], shares[:n], each) for run in runs for each in several for n in (1, 5))]
    )


def _taken(results: Sequence[T | None]) -> list[T]:
    found = [each for each in results if each is not None]
    if len(found) < len(results):
        raise AssertionError("a CUDA kernel does not take what it is given here")
    return found


def routers(device: str) -> Results:
    """Norm, router and choice in one kernel; by CUDA also of several tokens per cluster."""
    weight = _values(device, 128, WIDTH)
    both = [(route_rows, 5), (cuda_route_rows, 1), (cuda_route_rows, 21)]
    return [_routed_rows(device, rows, n, weight) for rows, n in both[: 3 if device == "cuda" and hopper() else 1]]


def _routed_rows(device: str, rows: Callable[..., Routed | None], tokens: int, weight: torch.Tensor) -> torch.Tensor:
    attrs = {"k": 8, "score": "softmax", "renormalize": True, "groups": 1, "kept_groups": 1, "scale": 1.0}
    x, slots = _values(device, tokens, WIDTH), torch.arange(tokens, dtype=torch.int32, device=device)
    prologue = Prologue(Norm(torch.ones(WIDTH, device=device), 1e-5), x.flip(0))
    (found,) = _taken([rows(x, prologue, weight, None, None, attrs, slots)])
    return found.shares


def samples(device: str) -> Results:
    """Greedy, every filter, edits with counts."""
    return [_sample(device, KINDS[kind]) for kind in ("greedy", "top_k50_p95", "top_p95", "min_p", "penalties", "bias")]


def routed(device: str) -> Results:
    """Experts chosen by groups, and run choice by choice and in blocks, of bf16 and of e4m3; one row of padding."""
    attrs = {"k": 2, "score": "sigmoid", "renormalize": True, "groups": 3, "kept_groups": 2, "scale": 1.5}
    number, hidden, ff = 6, 40, 24
    slots = torch.arange(7, dtype=torch.int32, device=device) - 1
    ids, shares = route(_values(device, 7, number), torch.linspace(0, 1, number, device=device), attrs, slots)
    x, up_bias, down_bias = (_values(device, *size) for size in ((7, hidden), (number, 2 * ff), (number, hidden)))
    gate_up, down = _values(device, number, 2 * ff, hidden), _values(device, number, hidden, ff)
    plain = Experts(gate_up, down, "silu", up_bias.float(), down_bias.float())
    narrow = Experts(quantize_fp8(gate_up), quantize_fp8(down), "gelu_tanh")
    few = [experts_by_choice(x[:2], ids[:2], shares[:2], given) for given in (plain, narrow)]
    return [shares[1:], *few, *(experts_in_blocks(x, ids, shares, given) for given in (plain, narrow))]


def packed_routed(device: str) -> Results:
    """The same by experts of MXFP4."""
    number, hidden, ff = 6, 160, 96
    x, up_bias, down_bias = (_values(device, *size) for size in ((7, hidden), (number, 2 * ff), (number, hidden)))
    gate_up, down = (
        quantize_experts(_values(device, *size)) for size in ((number, 2 * ff, hidden), (number, hidden, ff))
    )
    given = Experts(gate_up, down, "swiglu_clamped", up_bias.float(), down_bias.float(), 1.702, 7.0)
    ids = torch.arange(14, dtype=torch.int32, device=device).view(7, 2) % number
    shares = torch.rand(7, 2, device=device)
    return [packed_by_choice(x[:2], ids[:2], shares[:2], given), packed_in_blocks(x, ids, shares, given)]


def _sample(device: str, sampling: SamplingRow) -> torch.Tensor:
    logits = _values(device, 3, VOCAB)
    slots = torch.arange(3, dtype=torch.int32, device=device)
    positions = torch.full_like(slots, len(HISTORY))
    own = msgspec.structs.replace(sampling, seed=5)
    state = state_of(3, own, VOCAB, device)
    return sample(logits, slots, positions, state, edits=is_edited(own), pdl=small_step(slots)).float()


def steps(device: str) -> Results:
    """The kernels before and after a step."""
    found = step_around(3, device)(0)
    assert isinstance(found, torch.Tensor)
    return [found.float()]


GROUPS: dict[str, Callable[[str], Results]] = {
    "gemv": gemvs,
    "skinny": skinnies,
    "packed": packed,
    "norm": norms,
    "rope_write": writes,
    "decode_attention": decodes,
    "prefill_attention": prefills,
    "router": routers,
    "experts": routed,
    "packed_experts": packed_routed,
    "sample": samples,
    "step": steps,
}


CUDA_GROUPS: dict[str, Callable[[str], Results]] = {
    "stream": streams,
    "attend": attends,
    "streamed_experts": streamed_experts,
}
"""The same where CUDA kernels can be used."""


def run(device: str, only: Sequence[str] = ()) -> list[str]:
    """Launch all groups, or some by name; those whose results are not all finite. Raises ConfigError for another
    name."""
    groups = GROUPS | (CUDA_GROUPS if device == "cuda" and hopper() else {})
    unknown = sorted(set(only) - set(groups))
    if unknown:
        raise ConfigError(f"no such group: {', '.join(unknown)} (known: {', '.join(groups)})")
    return [name for name in only or groups if not all(bool(each.isfinite().all()) for each in groups[name](device))]


def main(only: Sequence[str] = ()) -> int:
    """Launch all on the GPU, or the groups named, so that a sanitizer tells which of them it means."""
    wrong = run("cuda", only)
    print("not finite:", ", ".join(wrong) or "none", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
