"""A deliberately late kernel in front of each one that is launched ahead: `python -m tokenspeed.bench.gpu.late`.

It lets the next kernel start at once, waits, and only then writes what that one reads, over values that are poisoned.
Ends with status 1 where a result changes by it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, globaltimer

from tokenspeed.bench.gpu.expert_cases import ExpertCase
from tokenspeed.bench.gpu.paged_steps import paged_step
from tokenspeed.bench.gpu.sample import KINDS, state_of
from tokenspeed.kernels.cuda.attend import attend
from tokenspeed.kernels.cuda.experts import stream_experts
from tokenspeed.kernels.cuda.prefill import prefill
from tokenspeed.kernels.cuda.registration import stream_or_project, tall_or_project
from tokenspeed.kernels.triton.attention_tiles import decode_tile, item_tokens
from tokenspeed.kernels.triton.decode_attention import decode_attention
from tokenspeed.kernels.triton.launch import dependent_launch
from tokenspeed.kernels.triton.linear import gemv, project
from tokenspeed.kernels.triton.operands import Norm, Prologue
from tokenspeed.kernels.triton.paged import Heads
from tokenspeed.kernels.triton.rope_write import rope_write
from tokenspeed.kernels.triton.sample import sample
from tokenspeed.ops.rope import Rope
from tokenspeed.quantization.narrow import narrow

LATE_NS = 1_000_000
"""Longer than the host takes to launch what is behind."""
RUNS = 3
HEADS = Heads(8, 2, 64, 0.125, 0)
PAGE = 16
_BLOCK = 1024
Project = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Case:
    """written: what the kernel in front writes, flat; run: the kernels behind it, from such values to their results."""

    name: str
    written: torch.Tensor
    run: Callable[[torch.Tensor], list[torch.Tensor]]


@triton.jit
def late_kernel(
    values: tl.tensor, target: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr
) -> None:
    """target = values, long after the kernel behind may start."""
    if PDL:
        gdc_launch_dependents()
        begin = globaltimer()
        now = begin
        while now - begin < LATE:
            now = globaltimer()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(values + at, mask=at < count), mask=at < count)


def write_late(values: torch.Tensor, target: torch.Tensor) -> None:
    """Launch the kernel in front."""
    count = values.numel()
    grid, pdl = (triton.cdiv(count, _BLOCK),), dependent_launch(values.device)
    late_kernel[grid](values, target, count, BLOCK=_BLOCK, LATE=LATE_NS, PDL=pdl)


def holds(case: Case) -> bool:
    """Whether results are, bit by bit, those of values that were there long before."""
    expected = case.run(case.written)
    for _ in range(RUNS):
        target = torch.full_like(case.written, torch.nan if case.written.is_floating_point() else 0)
        poison = torch.full((1 << 20,), torch.nan, device=target.device)
        del poison
        _synchronize(target.device)
        write_late(case.written, target)
        found = case.run(target)
        if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            return False
    return True


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _random(device: str, *size: int) -> torch.Tensor:
    return torch.randn(size, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)


def projection(
    name: str, device: str, rows: int, width: int, mode: str | None = None, product: Project = project
) -> Case:
    """Join, norm, gate and up, and the projection behind them."""
    inner = 128 if mode == "int4" else 16
    matrices = [_random(device, 2 * inner, width) / 32, _random(device, width, inner) / 4]
    up, down = [narrow(each, mode, name) for each in matrices] if mode else matrices
    norm = Norm(torch.ones(width, device=device), 1e-5)

    def layer(written: torch.Tensor) -> list[torch.Tensor]:
        x, branch = written.view(2, rows, width)
        hidden, joined = product(x, up, None, "silu", Prologue(norm, branch))
        y, _ = product(hidden, down, None, "none", None)
        return [hidden, y] if joined is None else [hidden, joined, y]

    return Case(name, _random(device, 2 * rows * width), layer)


def _split(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    size = HEADS.kv_heads * HEADS.head_dim
    return qkv.split([HEADS.group * size, size, size], dim=-1)


def decoding(name: str, device: str, rows: int, one_kernel: bool, far: bool = False) -> Case:
    """Rotation, writing and attention of decoding rows; their keys so far are old. far: without clusters."""
    step = paged_step([(50 * i + 7, 1) for i in range(rows)], HEADS, PAGE, _random(device, 1).dtype, 1, device)
    rope, tile = Rope(1e4, HEADS.head_dim), decode_tile(rows, HEADS.kv_heads, HEADS.head_dim, 2)
    width = (HEADS.group + 2) * HEADS.kv_heads * HEADS.head_dim

    def attention(written: torch.Tensor) -> list[torch.Tensor]:
        q, k, v = _split(written.view(rows, width))
        if one_kernel:
            out = attend(q, k, v, step.layer(0), rope, HEADS, far=far)
            assert out is not None
            return [out]
        ahead = dependent_launch(q.device)
        turned = rope_write(q, k, v, step.layer(0), rope, pdl=ahead)
        return [decode_attention(turned, step.layer(0), HEADS, tile, early=ahead, pdl=ahead)]

    return Case(name, _random(device, rows * width), attention)


def prompt(name: str, device: str) -> Case:
    """Attention of a prompt whose queries come late."""
    step = paged_step([(30, 100)], HEADS, PAGE, _random(device, 1).dtype, 1, device)
    items = step.items(item_tokens(HEADS.heads, HEADS.kv_heads, HEADS.head_dim, 2))[0]

    def attention(written: torch.Tensor) -> list[torch.Tensor]:
        out = prefill(written.view(100, -1), step.layer(0), items, HEADS)
        assert out is not None
        return [out]

    return Case(name, _random(device, 100 * HEADS.heads * HEADS.head_dim), attention)


def experts(name: str, device: str, tokens: int, fmt: str, run: Callable[..., torch.Tensor | None]) -> Case:
    """Experts whose rows, ids and shares come late: of down, which asks for its weights before its wait, by what lies
    one kernel further in front."""
    g = torch.Generator(device).manual_seed(torch.seed() % (1 << 40))
    case = ExpertCase(32, 4, 512, 256, fmt=fmt)
    given, (x, ids, shares) = case.random(g), case.choices(tokens, g)
    words = [each.contiguous().view(torch.int32).flatten() for each in (ids, shares, x)]

    def layer(written: torch.Tensor) -> list[torch.Tensor]:
        chosen, weights, rows = written.split([each.numel() for each in words])
        shape = ids.shape
        y = run(rows.view(x.dtype).view(x.shape), chosen.view(shape), weights.view(torch.float32).view(shape), given)
        assert y is not None
        return [y]

    return Case(name, torch.cat(words), layer)


def sampling(name: str, device: str, rows: int, kind: str, vocab: int = 4096) -> Case:
    """Sampling from logits that come late; what else it reads is older."""
    state = state_of(rows, KINDS[kind], vocab, device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    positions, ahead = torch.full_like(slots, 9), dependent_launch(slots.device)
    return Case(
        name,
        _random(device, rows * vocab),
        lambda written: [sample(written.view(rows, vocab), slots, positions, state, pdl=ahead)],
    )


def triton_cases(device: str) -> list[Case]:
    """The Triton kernels."""
    return [
        projection("gemv", device, 1, 128, product=gemv),
        projection("norm and skinny", device, 5, 256),
        projection("norm and skinny, fp8", device, 5, 256, mode="fp8"),
        projection("norm and packed, int4", device, 5, 128, mode="int4"),
        decoding("rope_write and decode attention", device, 3, one_kernel=False),
        sampling("greedy sampling", device, 3, "greedy"),
        sampling("sampling by noise", device, 3, "plain"),
        sampling("sampling of the likely", device, 3, "top_k50_p95"),
    ]


def cuda_cases(device: str) -> list[Case]:
    """The CUDA kernels, each behind the kernels that it runs behind."""
    return [
        projection("stream, one row", device, 1, 4096, product=stream_or_project),
        projection("stream, one row, fp8", device, 1, 4096, mode="fp8", product=stream_or_project),
        projection("stream, one row, int4", device, 1, 4096, mode="int4", product=stream_or_project),
        projection("norm and stream, three rows", device, 3, 4096, product=stream_or_project),
        projection("norm and stream by two programs, eight rows", device, 8, 8192, product=stream_or_project),
        projection("norm and tall products, 20 rows", device, 20, 4096, product=tall_or_project),
        projection("norm and tall products, 40 rows, fp8", device, 40, 4096, mode="fp8", product=tall_or_project),
        decoding("attend", device, 4, one_kernel=True),
        decoding("attend, far", device, 4, one_kernel=True, far=True),
        experts("experts, one token", device, 1, "plain", stream_experts),
        experts("experts, eight tokens, fp8", device, 8, "channel", stream_experts),
        prompt("prefill", device),
    ]


def main() -> int:
    """All cases on the GPU."""
    wrong = 0
    for case in [*triton_cases("cuda"), *cuda_cases("cuda")]:
        good = holds(case)
        wrong += not good
        print(f"{'ok' if good else 'WRONG':6} {case.name}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
