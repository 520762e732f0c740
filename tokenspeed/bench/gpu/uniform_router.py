"""A router that chooses uniformly, whatever the model thinks: for timing.

Random weights, and the greedy streams that they give, send all tokens to a few experts, of which a step then reads less
than it would of a real model. Here scores are noise, keyed by layer, sequence slot and position, so every run and every
replay of a captured step chooses alike, and each step anew. The kernels are the router's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.engine.llm import LLM
from tokenspeed.kernels.cuda.registration import route_by_either
from tokenspeed.kernels.triton.dense import Node, Outputs
from tokenspeed.kernels.triton.expert_registration import ROUTERS, router_outputs
from tokenspeed.kernels.triton.operands import Matrix
from tokenspeed.kernels.triton.route import Noise, route
from tokenspeed.kernels.triton.view import PagedView
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.executor import GpuExecutor

_STEPS = 8
"""Decode steps whose experts are counted."""


def _noise(view: PagedView, record: Node) -> Noise:
    # Values are numbered through the program, so an output tells the layer.
    return Noise(view.positions, record.outputs[0])


def _run(view: PagedView, record: Node, inputs: Sequence[torch.Tensor], weights: Sequence[Matrix]) -> Outputs:
    return route(inputs[0], None, record.attrs, view.slots, _noise(view, record))


def _run_fused(view: PagedView, record: Node, inputs: Sequence[torch.Tensor], weights: Sequence[Matrix]) -> Outputs:
    (choice,) = (part for part in record.plain() if part.op == "route")
    return router_outputs(view, record, inputs, weights, _noise(view, choice), route_by_either)


def route_uniformly(llm: LLM) -> None:
    """Let a model choose its experts so from now on. Raises ConfigError where it does not run on a GPU."""
    backend, executor = llm.core.backend, llm.core.executor
    if not isinstance(backend, GpuBackend) or not isinstance(executor, GpuExecutor):
        raise ConfigError(f"--router uniform is for GPUs only, and this model runs by {backend.name}")
    backend.run_instead({"route": _run} | dict.fromkeys(ROUTERS, _run_fused))
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
            ids, _ = route(logits, None, record.attrs, slots, Noise(at, record.outputs[0]))
            counts.append(ids.unique().numel())
    return mean(counts)
