"""`python -m tokenspeed.bench.gpu.memory`: KV memory sleeps and wakes on a real card, under a captured graph.

First the range alone: memory is mapped, a graph that reads it is captured and replayed, the range sleeps, what is free
is looked at, it wakes, and the same graph must read what has been written since. Then a model: the same tokens before
and after. Prints one JSON object and ends with status 1 where anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.runner.gpu.card import CudaCard
from tokenspeed.runner.gpu.memory import DeviceMemory

MIB = 2**20


def check_range(nbytes: int) -> dict[str, Any]:
    """Map, write, capture, replay, sleep, wake, replay. Times in milliseconds, memory in MiB."""
    card = CudaCard(torch.device("cuda"))
    card.settle()
    free = [card.memory()[0]]
    memory, made_ms = _timed(lambda: card.pages(nbytes))
    words, address = memory.data.view(torch.int64), memory.data.data_ptr()
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = _capture(words, total)
    sums = [_sum_of(3, words, total, graph)]
    card.settle()
    free.append(card.memory()[0])
    _, slept_ms = _timed(memory.sleep)
    free.append(card.memory()[0])
    _, woke_ms = _timed(memory.wake)
    free.append(card.memory()[0])
    sums.append(_sum_of(5, words, total, graph))
    read = words[:: words.numel() // 64].sum().item()  # beside the graph, through the tensor made before
    memory.close()
    checks = {
        "virtual": isinstance(memory, DeviceMemory),
        "sums": sums == [3 * words.numel(), 5 * words.numel()],
        "read": read == 5 * len(range(0, words.numel(), words.numel() // 64)),
        "address": address == memory.data.data_ptr(),
        "freed": free[2] - free[1] >= nbytes,
        "taken_again": free[2] - free[3] >= nbytes,
    }
    times = {"map_ms": made_ms, "sleep_ms": slept_ms, "wake_ms": woke_ms}
    return {"bytes": nbytes, "free_mib": [each // MIB for each in free], **times, "checks": checks}


def _capture(words: torch.Tensor, total: torch.Tensor) -> torch.cuda.CUDAGraph:
    words.fill_(1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what sums need is set up before the capture
        total.copy_(words.sum())
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.copy_(words.sum())
    return graph


def _sum_of(value: int, words: torch.Tensor, total: torch.Tensor, graph: torch.cuda.CUDAGraph) -> int:
    words.fill_(value)
    total.zero_()
    graph.replay()
    return int(total.item())


def check_model(model: str) -> dict[str, Any]:
    """A shipped config with random weights and default settings: greedy tokens before sleep and after."""
    # A prefix hit would cut prompts elsewhere, and rounding with them.
    llm = LLM(model, load_format="dummy", device="cuda", enable_prefix_caching=False)
    prompts = [[number + 1 + at for at in range(40 + 9 * number)] for number in range(8)]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)

    def tokens() -> list[list[int]]:
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    found = [tokens() for _ in range(4)]  # the last ones by graphs
    graphs = len(llm.core.executor.graphs.captured())  # type: ignore[attr-defined]
    free = [torch.cuda.mem_get_info()[0]]
    _, slept_ms = _timed(llm.sleep)
    free.append(torch.cuda.mem_get_info()[0])
    _, woke_ms = _timed(llm.wake_up)
    found.append(tokens())
    cache = llm.core.capacity.num_pages * llm.core.page_shape.page_bytes
    checks = {
        "tokens": found[-1] == found[-2],
        "freed": free[1] - free[0] >= cache,
        "graphs_stay": graphs > 0 and len(llm.core.executor.graphs.captured()) >= graphs,  # type: ignore[attr-defined]
    }
    llm.close()
    times = {"sleep_ms": slept_ms, "wake_ms": woke_ms}
    return {"model": model, "cache_mib": cache // MIB, "max_model_len": llm.core.capacity.max_model_len,
            "num_pages": llm.core.capacity.num_pages, "free_mib": [each // MIB for each in free], **times,
            "graphs": graphs, "checks": checks}  # fmt: skip


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    found = work()
    torch.cuda.synchronize()
    return found, round((time.perf_counter() - started) * 1e3, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.bench.gpu.memory", description=__doc__)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the range (default: 8)")
    parser.add_argument("--model", default="llama-3.2-1b", help="a shipped config; none leaves the model out")
    options = parser.parse_args(arguments)
    found = [check_range(int(options.gib * 1024) * MIB)]
    if options.model != "none":
        found.append(check_model(options.model))
    ok = all(all(part["checks"].values()) for part in found)
    print(json.dumps({"device": torch.cuda.get_device_name(), "ok": ok, "found": found}, indent=2))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
