"""A router that chooses uniformly, whatever the model thinks: for timing.

Random weights, and the greedy streams that they give, send all tokens to a few experts, of which a step then reads less
than it would of a real model. Here scores are noise, keyed by layer, sequence slot and position, so every run and every
replay of a captured step chooses alike, and each step anew. The kernel costs what the router's own does.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.engine.llm import LLM
from tokenspeed.kernels.registry import Implementation, Situation
from tokenspeed.kernels.triton.dense import Node
from tokenspeed.kernels.triton.launch import dependent_launch, options
from tokenspeed.kernels.triton.operands import Matrix
from tokenspeed.kernels.triton.route import MOST_EXPERTS, choose
from tokenspeed.kernels.triton.view import PagedView
from tokenspeed.ops.definitions import Attrs, Operands
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.executor import GpuExecutor

PRIORITY = 100
"""Before the router's own kernel."""
_SLOTS = 4096
"""Streams of noise of a position: one for each slot."""
_STEPS = 8
"""Decode steps whose experts are counted."""


@triton.jit
def uniform_kernel(
    logits: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    ids: tl.tensor,
    shares: tl.tensor,
    seed: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """As `route.route_kernel`, of one group, by noise in [0, 1). The scores are read and not used."""
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, WIDTH_PAD)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots + row)
    stream = tl.load(positions + row).to(tl.int32) * SLOTS + slot
    noise = tl.rand(seed, stream * WIDTH_PAD + within)
    read = tl.load(logits + row * WIDTH + within, mask=within < WIDTH, other=0.0).to(tl.float32)
    noise = tl.where(read == float("inf"), 2.0, noise)
    choose(noise, None, ids, shares, row, scale, slot >= 0, K, SCORE, RENORMALIZE, 1, 1, WIDTH, 1, WIDTH_PAD)


def uniform_route(
    logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, attrs: Attrs, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int32 [T, k] and weights float32 [T, k], from logits [T, experts], contiguous, slots and positions int32
    [T]. attrs: of the op `route`; its groups are not looked at."""
    (rows, experts), k = logits.shape, attrs["k"]
    ids = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    shares = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    width = triton.next_power_of_2(experts)
    uniform_kernel[(rows,)](
        logits, slots, positions, ids, shares, seed, attrs["scale"], K=k, SCORE=attrs["score"],
        RENORMALIZE=attrs["renormalize"], WIDTH=experts, WIDTH_PAD=width, SLOTS=_SLOTS,
        **options(8 if width > 128 else 4, dependent_launch(logits.device)),
    )  # fmt: skip
    return ids, shares


def _run(
    view: PagedView, record: Node, inputs: Sequence[torch.Tensor], weights: Sequence[Matrix]
) -> tuple[torch.Tensor, ...]:
    # Values are numbered through the program, so the first output tells the layer.
    return uniform_route(inputs[0], view.slots, view.positions, record.attrs, record.outputs[0])


def _takes(operands: Operands, situation: Situation) -> bool:
    return int(operands.inputs[0][-1]) <= MOST_EXPERTS


UNIFORM = Implementation("uniform", "route", "bench", _run, _takes, PRIORITY)


def route_uniformly(llm: LLM) -> None:
    """Let a model choose its experts so from now on. Raises ConfigError where it does not run on a GPU."""
    backend, executor = llm.core.backend, llm.core.executor
    if not isinstance(backend, GpuBackend) or not isinstance(executor, GpuExecutor):
        raise ConfigError(f"--router uniform is for GPUs only, and this model runs by {backend.name}")
    backend.prefer(UNIFORM)
    executor.graphs.forget()


def distinct_experts_of(llm: LLM, batch: int, context: int) -> float:
    """How many experts a layer's tokens choose in a decode step of `batch` sequences that hold `context` tokens, on
    average over all layers with experts and some steps."""
    program, device = llm.core.model.program, llm.core.model.device
    routers = [part for record in program.records for part in record.plain() if part.op == "route"]
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    counts = []
    for record in routers:
        experts = int(program.shapes[record.inputs[0]][-1])
        logits = torch.zeros(batch, experts, device=device)
        for step in range(_STEPS):
            at = torch.full_like(slots, context + step)
            ids, _ = uniform_route(logits, slots, at, record.attrs, record.outputs[0])
            counts.append(ids.unique().numel())
    return mean(counts)
