"""The CUDA kernels as implementations. Each has a Triton twin, which takes what they do not."""

from __future__ import annotations

from functools import cache, partial

import torch

from tokenspeed.kernels.cuda import prefill
from tokenspeed.kernels.cuda.attend import MOST_TOKENS, attend, fits
from tokenspeed.kernels.cuda.dense_tall import FEWEST_TOKENS as FEWEST_TALL_ROWS
from tokenspeed.kernels.cuda.dense_tall import MOST_TOKENS as MOST_TALL_ROWS
from tokenspeed.kernels.cuda.dense_tall import tall_rows
from tokenspeed.kernels.cuda.experts import stream_experts
from tokenspeed.kernels.cuda.experts_packed import MOST_TOKENS as MOST_PACKED_TOKENS
from tokenspeed.kernels.cuda.experts_packed import stream_packed
from tokenspeed.kernels.cuda.experts_tall import BF16_TOKENS, multiply_experts
from tokenspeed.kernels.cuda.experts_tall import MOST_TOKENS as MOST_TALL_TOKENS
from tokenspeed.kernels.cuda.program import compiler_found, divide_alike
from tokenspeed.kernels.cuda.router import MOST_TOKENS as MOST_ROUTED_TOKENS
from tokenspeed.kernels.cuda.router import fits as fits_router
from tokenspeed.kernels.cuda.router import route_rows, tokens_of
from tokenspeed.kernels.cuda.stream import stream, stream_rows
from tokenspeed.kernels.cuda.stream_tiles import MOST_ROWS
from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.kernels.triton import dense, router
from tokenspeed.kernels.triton.attention_registration import (
    MOST_DECODE_TOKENS,
    Inputs,
    Tensors,
    by_tiles,
    rotation_of,
    run_attention,
    run_rope_write,
)
from tokenspeed.kernels.triton.expert_operands import Experts
from tokenspeed.kernels.triton.expert_registration import ROUTERS, run_chosen, run_router, takes_experts, takes_router
from tokenspeed.kernels.triton.experts import run_experts
from tokenspeed.kernels.triton.linear import project
from tokenspeed.kernels.triton.operands import Matrix, Prologue, Rows
from tokenspeed.kernels.triton.paged import Heads, PagedLayer, heads_of, paged_layer
from tokenspeed.kernels.triton.route import Noise
from tokenspeed.kernels.triton.view import PagedView, Reach, RecordView
from tokenspeed.ops.definitions import Attrs, Operands
from tokenspeed.quantization import fp8, mxfp4
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts

PRIORITY = 20
MOST_EXPERT_TOKENS = 4
"""Qwen3-30B-A3B's experts of 1 / 2 / 4 / 8 tokens: bf16 22.5 / 42.1 / 73.9 / 127.5 us, by Triton 27.2 / 47.5 / 81.2 /
118.6; fp8 18.2 / 34.8 / 59.1 / 121, by Triton 24.3 / 39.6 / 69.6 / 74.6. On Hopper `experts_tall` has all e4m3 up to
MOST_TALL_TOKENS."""


def register(registry: Registry) -> None:
    """Add the projections of few rows of bf16, routers, and the attention of decoding tokens and of prompts."""
    if usable():
        divide_alike()
    run, run_tall = (partial(dense.run_projection, project=each) for each in (stream_or_project, tall_or_project))
    for op in ("linear", *dense.FUSED):
        registry.add(Implementation(f"cuda.{op}", op, "cuda", run, _takes, PRIORITY))
        registry.add(Implementation(f"cuda.tall_{op}", op, "cuda", run_tall, _takes_tall, PRIORITY))
    for op in ROUTERS:
        run_rows = partial(run_router, rows=route_by_either)
        registry.add(Implementation(f"cuda.{op}", op, "cuda", run_rows, _takes_router, PRIORITY))
    for op in ("rope_attention", "qk_norm_rope_attention"):
        registry.add(Implementation("cuda.attend", op, "cuda", run_attend, _takes_attend, PRIORITY))
    chosen = partial(run_chosen, run=stream_or_run)
    registry.add(Implementation("cuda.experts", "experts", "cuda", chosen, _takes_experts, PRIORITY))
    registry.add(Implementation("cuda.prefill", "attention", "cuda", run_prefill, _takes_prefill, PRIORITY))


def stream_or_project(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, act: str, prologue: Prologue | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By the streaming kernel where its tiles fit, else as `triton.linear.project`."""
    if x.shape[0] == 1:
        streamed = stream(x, weight, bias, act, prologue)
    else:
        y = stream_rows(Rows(x), weight, bias, act) if prologue is None else None
        streamed = None if y is None else (y, None)
    return streamed or project(x, weight, bias, act, prologue, stream_rows)


def tall_or_project(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, act: str, prologue: Prologue | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By warpgroup products where their tiles fit, else as `triton.linear.project`."""
    return project(x, weight, bias, act, prologue, tall_rows)


def stream_or_run(x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, given: Experts) -> torch.Tensor:
    """By the streaming kernels where their tiles fit, else as `triton.experts.run_experts`."""
    streamed = streamed_experts(x, ids, shares, given)
    return run_experts(x, ids, shares, given) if streamed is None else streamed


def streamed_experts(x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, given: Experts) -> torch.Tensor | None:
    """By the streaming kernels, None where no variant takes them."""
    if isinstance(given.down, Mxfp4Experts):
        return stream_packed(x, ids, shares, given)
    tall = hopper() and (isinstance(given.down, Fp8Weight) or len(x) in BF16_TOKENS)
    found = multiply_experts(x, ids, shares, given) if tall else None
    return stream_experts(x, ids, shares, given) if found is None else found


def route_by_either(
    x: torch.Tensor,
    prologue: Prologue,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    attrs: Attrs,
    slots: torch.Tensor,
    noise: Noise | None = None,
) -> router.Routed:
    """By `router.cu` where its registers hold the weights, else as `triton.router.route_rows`."""
    given = (x, prologue, weight, bias, correction, attrs, slots, noise)
    return (route_rows(*given) if usable() else None) or router.route_rows(*given)


def run_attend(view: PagedView, record: RecordView, inputs: Inputs, weights: Inputs) -> Tensors:
    """rope_attention and qk_norm_rope_attention: inputs q, k, v; weights those of the write, then of the attention. By
    the Triton kernels in steps that one kernel does not suit, and for pages that it does not take."""
    q, k, v = inputs
    rope, norms, layer = rotation_of(record, weights)
    rest = weights[2 if norms else 0 :]
    if view.reach:
        sinks = rest[0] if rest else None
        out = attend(
            q, k, v, paged_layer(view, layer), rope, heads_of(record.attrs), norms, sinks, view.reach is Reach.FAR
        )
        if out is not None:
            return (out,)
    rotated, _ = run_rope_write(view, record, inputs, weights)
    return run_attention(view, record, (rotated,), rest, prefill_or_tiles)


def prefill_or_tiles(
    q: torch.Tensor, paged: PagedLayer, items: torch.Tensor, heads: Heads, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention of work items by the CUDA kernel where it can, else by the Triton kernel."""
    out = prefill.prefill(q, paged, items, heads) if sinks is None and prefill.fits(heads) and hopper() else None
    return by_tiles(q, paged, items, heads, sinks) if out is None else out


def run_prefill(view: PagedView, record: RecordView, inputs: Inputs, weights: Inputs) -> Tensors:
    """attention of a bucket beyond MOST_DECODE_TOKENS."""
    return run_attention(view, record, inputs, weights, prefill_or_tiles)


def _takes_attend(operands: Operands, situation: Situation) -> bool:
    attrs = operands.attrs
    fitting = situation.tokens <= MOST_TOKENS and fits(attrs["heads"], attrs["kv_heads"], attrs["head_dim"])
    return fitting and not attrs["softcap"] and _on_device(situation)


def _takes_prefill(operands: Operands, situation: Situation) -> bool:
    fitting = situation.tokens > MOST_DECODE_TOKENS and not operands.weights and prefill.fits(heads_of(operands.attrs))
    return fitting and _on_device(situation) and hopper()


def _takes(operands: Operands, situation: Situation) -> bool:
    return situation.tokens <= MOST_ROWS and _on_device(situation)


def _takes_tall(operands: Operands, situation: Situation) -> bool:
    return FEWEST_TALL_ROWS <= situation.tokens <= MOST_TALL_ROWS and _on_device(situation) and hopper()


def _takes_experts(operands: Operands, situation: Situation) -> bool:
    formats = situation.formats.get(operands.weights[0], ())
    most = MOST_PACKED_TOKENS if mxfp4.FORMAT in formats else MOST_EXPERT_TOKENS
    few = situation.tokens <= (MOST_TALL_TOKENS if fp8.FORMAT in formats and hopper() else most)
    return few and not situation.batch_invariant and takes_experts(operands, situation) and _on_device(situation)


def _takes_router(operands: Operands, situation: Situation) -> bool:
    """Beyond `router.FEW_TOKENS`, only by the CUDA kernel."""
    taken = _on_device(situation) and takes_router(operands, situation, MOST_ROUTED_TOKENS)
    return taken and (situation.tokens <= router.FEW_TOKENS or _fits_router(operands, situation.tokens))


def _fits_router(operands: Operands, tokens: int) -> bool:
    experts, hidden = next(shape for shape in operands.weight_shapes if len(shape) > 1)
    return fits_router(hidden, experts, operands.attrs, tokens_of(tokens, experts))


def _on_device(situation: Situation) -> bool:
    return situation.device == "cuda" and situation.dtype == "bfloat16" and usable()


@cache
def hopper() -> bool:
    """Whether the device has warpgroup products, which only Hopper has, and the compiler is there."""
    return usable() and torch.cuda.get_device_capability()[0] == 9


@cache
def usable() -> bool:
    """Whether the device has bulk copies and dependent launch (Hopper and later), and the compiler is there."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability() >= (9, 0) and compiler_found()
