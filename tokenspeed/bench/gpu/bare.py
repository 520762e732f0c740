"""A step's time on the device alone: its graphs replayed back to back, with the state of a step in mid-generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM

REPLAYS = 50
AT_STEP = 20
"""Decode steps before the measurement."""


def bare_graph_ms(llm: LLM, prompts: list[list[int]], sampling: dict[str, float]) -> dict[str, float]:
    """Milliseconds of the forward graph and of the sampling graph of a decode step of all prompts at once."""
    executor: Any = llm.core.executor
    found: dict[str, float] = {}
    launch, steps = executor.launch, 0

    def counted(plan: Any) -> Any:
        nonlocal steps
        launched = launch(plan)
        steps += all(row.max_tokens == 1 for row in plan.rows) and len(plan.rows) == len(prompts)
        if steps == AT_STEP:
            found.update(_replayed(executor, len(prompts)))
        return launched

    executor.launch = counted
    params = SamplingParams(max_tokens=AT_STEP + 8, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    try:
        llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    finally:
        executor.launch = launch
    return found


def _replayed(executor: Any, rows: int) -> dict[str, float]:
    saved = [t.clone() for t in (executor.state.flat, executor.state.lengths.pool)]
    forward = _timed(lambda: executor.graphs.replay("forward", rows))
    sampling = _timed(lambda: executor.graphs.replay("sample", rows))
    executor.state.flat.copy_(saved[0])
    executor.state.lengths.pool.copy_(saved[1])
    return {"forward_ms": forward, "sample_ms": sampling}


def _timed(work: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(REPLAYS):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPLAYS
