"""Attention of prompts by the CUDA kernel and by Triton: `python -m tokenspeed.bench.gpu.prefill [--probe]`.

Compares the CUDA kernel (`kernels/cuda/prefill.cu`) with float32 first, over outputs poisoned before, then times both.
--probe looks at one half of the kernel at a time: the weights of each key, then sums of values with equal weights.
Ends with status 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from tokenspeed.bench.gpu.graph_timing import microseconds
from tokenspeed.bench.gpu.paged_steps import PagedStep, paged_step
from tokenspeed.kernels.cuda.prefill import prefill
from tokenspeed.kernels.triton.attention_tiles import item_tokens, prefill_tile
from tokenspeed.kernels.triton.paged import Heads, PagedLayer
from tokenspeed.kernels.triton.prefill_attention import prefill_attention

MODELS = {"1b": Heads(32, 8, 64, 64**-0.5, 0), "8b": Heads(32, 8, 128, 128**-0.5, 0)}
TIMED = ((7680, 512), (0, 1024), (0, 4096))
"""Tokens before, tokens fed."""
TOLERANCE = 0.04
"""Of the root mean square of a row: weights and results have 8 bits."""
Attend = Callable[[torch.Tensor, PagedLayer, torch.Tensor, Heads], torch.Tensor]
Rows = Sequence[tuple[int, int]]


def by_triton(q: torch.Tensor, paged: PagedLayer, items: torch.Tensor, heads: Heads) -> torch.Tensor:
    """The Triton kernel with its own tile."""
    return prefill_attention(q, paged, items, heads, prefill_tile(heads.head_dim, 2))


def by_cuda(q: torch.Tensor, paged: PagedLayer, items: torch.Tensor, heads: Heads) -> torch.Tensor:
    """The CUDA kernel."""
    out = prefill(q, paged, items, heads)
    assert out is not None, "pages that it does not take"
    return out


def random_queries(step: PagedStep, heads: Heads) -> torch.Tensor:
    """bf16 [T, heads * head_dim]."""
    return torch.randn(len(step.positions), heads.heads * heads.head_dim, device="cuda").bfloat16()


def items_of(step: PagedStep, heads: Heads) -> torch.Tensor:
    """The step's work list."""
    return step.items(item_tokens(heads.heads, heads.kv_heads, heads.head_dim, 2))[0]


def checked() -> list[tuple[Rows, Heads, int]]:
    """Chunks that end within a page, a block and nowhere, of short and long sequences, alone and together."""
    shapes = [(group, dim) for dim in (64, 128) for group in (1, 4, 8)]
    cases: list[tuple[Rows, Heads, int]] = []
    for number, (group, dim) in enumerate(shapes):
        heads = Heads(4 * group, 4, dim, dim**-0.5, 0)
        for chunk in (1, 17, 64, 128, 500, 512, 1024):
            befores = (0, 1 + 331 * number, 9999 - chunk)
            cases += [([(before, chunk)], heads, 64 if chunk == 128 else 16) for before in befores]
        cases.append(([(0, 33), (5000, 1), (77, 300), (127, 1), (128, 129), (1, 1), (2048, 64)], heads, 16))
    cases += [([(0, 200), (300, 77)], Heads(28, 4, 128, 0.09, 0), page) for page in (16, 48, 128, 256)]
    cases += [([(0, length)], MODELS["8b"], 16) for length in range(1, 10000, 1111)]
    return cases


def check() -> bool:
    """Whether the CUDA kernel agrees with float32 on fresh random data, and twice with itself."""
    results = [_same(rows, heads, page) for rows, heads, page in checked()]
    return all(results)


def _same(rows: Rows, heads: Heads, page: int) -> bool:
    step = paged_step(rows, heads, page, layers=1)
    q, paged, items = random_queries(step, heads), step.layer(0), items_of(step, heads)
    expected = step.answer(q, heads)
    _poison(q)
    out = by_cuda(q, paged, items, heads)
    worst = float(_relative(out, expected, heads.head_dim).nan_to_num(torch.inf).max())
    good = worst < TOLERANCE and torch.equal(out, by_cuda(q, paged, items, heads)) and _pads(q, paged, items, heads)
    shape = f"{heads.heads}/{heads.kv_heads} heads of {heads.head_dim}, pages of {page}"
    print(f"{'ok' if good else 'WRONG':6} {worst:.4f}  {list(rows)} {shape}", flush=True)
    return good


def _poison(q: torch.Tensor) -> None:
    # The allocator gives the same memory to a result of the same size.
    torch.full_like(q, torch.nan)


def _relative(out: torch.Tensor, expected: torch.Tensor, dim: int) -> torch.Tensor:
    """Errors [T, heads, head_dim] in units of the root mean square of a head's row."""
    exact = expected.unflatten(-1, (-1, dim))
    return (out.float().unflatten(-1, (-1, dim)) - exact).abs() / exact.square().mean(-1, keepdim=True).sqrt()


def _pads(q: torch.Tensor, paged: PagedLayer, items: torch.Tensor, heads: Heads) -> bool:
    """Whether an item without a sequence gives zeros, and leaves the others as they were."""
    before, padded = by_cuda(q, paged, items, heads), items.clone()
    padded[0, 0] = -1
    _poison(q)
    out, count = by_cuda(q, paged, padded, heads), int(items[0, 2])
    first = int(items[0, 1])
    before[first : first + count] = 0
    return torch.equal(out, before)


def probe(heads: Heads) -> bool:
    """As many keys as a head has columns. First values of ones on a diagonal, so that a row's result is its weights:
    what is wrong then lies in queries, keys, scores or mask. Then queries of zeros: what is wrong lies in values."""
    dim = heads.head_dim
    good = True
    for name in ("scores", "values"):
        step = paged_step([(0, dim)], heads, 16, layers=1)
        q = random_queries(step, heads)
        if name == "scores":
            at = step.positions.long()
            pages = step.table.long()[0, at // 16]
            step.kv[pages, 0, 1, at % 16] = torch.eye(dim, device=q.device).bfloat16()[:, None]
        else:
            q.zero_()
        _poison(q)
        found, expected = by_cuda(q, step.layer(0), items_of(step, heads), heads), step.answer(q, heads)
        wrong = (found.float() - expected).abs().nan_to_num(torch.inf).unflatten(-1, (-1, dim))
        good &= float(wrong.max()) < 0.02
        print(f"{name} of {heads}: worst {float(wrong.max()):.4f}; most of 16 tokens (down) and 16 columns, head 0")
        print(wrong[:, 0].reshape(dim // 16, 16, dim // 16, 16).amax((1, 3)).cpu().numpy().round(3))
        print(f"  most of each head: {wrong.amax((0, 2)).cpu().numpy().round(3)}")
        for kind, result in (("found", found), ("expected", expected)):
            print(f"  {kind:8} {result[dim // 2 + 1, :8].float().cpu().numpy().round(4)}")
    return good


def timed(model: str, before: int, fed: int, page: int = 16) -> None:
    """Print both kernels' time, pages of so many layers in turn that they come from memory."""
    heads = MODELS[model]
    step = paged_step([(before, fed)], heads, page)
    q, items = random_queries(step, heads), items_of(step, heads)
    flops = 4 * heads.heads * heads.head_dim * (fed * before + fed * (fed + 1) / 2)
    for name, attend in (("triton", by_triton), ("cuda", by_cuda)):
        us = microseconds(lambda i, attend=attend: attend(q, step.layer(i), items, heads))  # type: ignore[misc]
        print(f"{us:9.2f} us {flops / us / 1e6:7.1f} TFLOP/s  {model} {fed} after {before}: {name}", flush=True)


def main() -> int:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--probe", action="store_true", help="look at one half of the kernel at a time")
    parser.add_argument("--no-check", action="store_true", help="only time")
    options = parser.parse_args()
    probed = [probe(MODELS[model]) for model in options.model if options.probe]
    if not all(probed):
        return 1
    if not options.no_check and not check():
        return 1
    for model in options.model:
        for before, fed in TIMED:
            timed(model, before, fed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
