"""Attention of decoding tokens by one kernel and by three: `python -m tokenspeed.bench.gpu.attend --model 8b`.

Compares the one (`kernels/cuda/attend.cu`) with the three Triton kernels and with float32 first, over outputs poisoned
before, then times both between the projections in front of and behind them, as a decode step has them: microseconds
beyond the same chain without attention. Ends with status 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from tokenspeed.bench.gpu.chain import matrix
from tokenspeed.bench.gpu.graph_timing import microseconds
from tokenspeed.bench.gpu.paged_steps import PagedStep, paged_step
from tokenspeed.kernels.cuda.attend import attend, reach_of
from tokenspeed.kernels.cuda.registration import stream_or_project
from tokenspeed.kernels.triton.attention_registration import MOST_EARLY_TOKENS
from tokenspeed.kernels.triton.attention_tiles import decode_tile
from tokenspeed.kernels.triton.decode_attention import decode_attention
from tokenspeed.kernels.triton.launch import small_step
from tokenspeed.kernels.triton.linear import project
from tokenspeed.kernels.triton.operands import Norm, Prologue
from tokenspeed.kernels.triton.paged import Heads, PagedLayer
from tokenspeed.kernels.triton.rope_write import HeadNorm, rope_write
from tokenspeed.kernels.triton.view import Reach
from tokenspeed.ops.rope import Rope

MODELS = {"1b": (2048, Heads(32, 8, 64, 64**-0.5, 0)), "8b": (4096, Heads(32, 8, 128, 128**-0.5, 0))}
"""Hidden size, attention."""
LAYERS = 6
TOLERANCE = 0.02
"""Absolute, bf16 outputs of unit-scale values."""
Norms = tuple[HeadNorm, HeadNorm] | None
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PagedLayer], torch.Tensor]


def split(qkv: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, views."""
    size = heads.kv_heads * heads.head_dim
    q, k, v = qkv.split([heads.group * size, size, size], dim=-1)
    return q, k, v


def by_three(heads: Heads, rope: Rope, norms: Norms = None, sinks: torch.Tensor | None = None) -> Attend:
    """Rotation and write, attention by splits, their sum."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, paged: PagedLayer) -> torch.Tensor:
        tile, pdl = decode_tile(len(q), heads.kv_heads, heads.head_dim, 2), small_step(q)
        turned = rope_write(q, k, v, paged, rope, norms, pdl)
        return decode_attention(turned, paged, heads, tile, sinks, early=len(q) <= MOST_EARLY_TOKENS and pdl, pdl=pdl)

    return run


def by_one(
    heads: Heads, rope: Rope, norms: Norms = None, sinks: torch.Tensor | None = None, longest: int = 0
) -> Attend:
    """The one kernel, as for sequences that are all as long as the longest."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, paged: PagedLayer) -> torch.Tensor:
        out = attend(q, k, v, paged, rope, heads, norms, sinks, reach_of([longest] * len(q)) is Reach.FAR)
        assert out is not None, "pages that it does not take"
        return out

    return run


def check() -> bool:
    """Lengths that end within a tile, a page and nowhere, windows, norms, sinks, partly turned heads; several rows."""
    cases = [([length], Heads(32, 8, 128, 128**-0.5, 0), 128) for length in (0, 1, 15, 16, 777, 32768)]
    cases += [([777], Heads(40, 8, 128, 0.09, window), 128) for window in (1, 100)]
    cases += [([333], Heads(4, 4, 64, 0.125, 0), 32), ([5000], Heads(64, 8, 64, 0.125, 128), 64)]
    cases += [([40000], Heads(16, 8, 64, 0.125, 0), 64), ([9000], Heads(64, 8, 128, 0.09, 0), 128)]
    cases += [(list(range(0, 97 * count, 97)), Heads(32, 8, 64, 0.125, 0), 64) for count in (2, 5, 16, 40)]
    cases += [(list(range(1500, 0, -11)), Heads(32, 8, 128, 0.125, window), 64) for window in (0, 200)]
    cases += [(list(range(0, 400, 7)), Heads(64, 8, 128, 0.1, 0), 128)]
    results = [
        _same(lengths, heads, Rope(5e5, turned, scale=1.3 if normed else 1.0), page, normed, sink)
        for lengths, heads, turned in cases
        for page, normed, sink in ((16, False, False), (64, True, True))
    ]
    return all(results)


def _same(lengths: list[int], heads: Heads, rope: Rope, page: int, normed: bool, sink: bool) -> bool:
    step = paged_step([(length, 1) for length in lengths], heads, page, layers=1)
    paged, dim, at = step.layer(0), heads.head_dim, _own_entries(step)
    q, k, v = split(
        torch.randn(len(lengths), (heads.heads + 2 * heads.kv_heads) * dim, device="cuda").bfloat16(), heads
    )
    norms = (HeadNorm(torch.rand(dim, device="cuda") + 0.5, 1e-6), HeadNorm(torch.rand(dim, device="cuda") + 0.5, 1e-2))
    given = (heads, rope, norms if normed else None, torch.randn(heads.heads, device="cuda") * 2 if sink else None)
    expected, written = by_three(*given)(q, k, v, paged).float(), step.kv[at].float()
    exact = expected if sink else step.answer(rope_write(q, k, v, paged, rope, given[2]), heads)
    step.kv[at] = torch.nan
    poison = torch.full((1 << 20,), torch.nan, device="cuda")
    del poison
    one = by_one(*given, max(lengths))
    out = one(q, k, v, paged)
    worst = float(torch.maximum((out - expected).abs(), (out - exact).abs()).max())
    kept = float((step.kv[at].float() - written).abs().max())
    good = worst < TOLERANCE and kept < TOLERANCE and torch.equal(out, one(q, k, v, paged))
    shape = f"{heads.heads}/{heads.kv_heads} heads of {dim}, window {heads.window}, {rope.dim} turned, pages of {page}"
    print(f"{'ok' if good else 'WRONG':6} {worst:.5f} {kept:.5f}  {lengths[-3:]} {shape}", flush=True)
    return good


def _own_entries(step: PagedStep) -> tuple[torch.Tensor | int | slice, ...]:
    """Where keys and values of the step's own tokens are, of layer 0."""
    at, size = step.positions.long(), step.kv.shape[3]
    return step.table.long().gather(1, (at // size)[:, None])[:, 0], 0, slice(None), at % size


def beyond(model: str, batch: int, context: int) -> tuple[float, float, float]:
    """Microseconds of projections in front of and behind an attention without one, and what three kernels and one
    add to them."""
    hidden, heads = MODELS[model]
    step = paged_step([(context, 1)] * batch, heads, 16, layers=LAYERS)
    width, norm = heads.heads * heads.head_dim, Norm(torch.ones(hidden, device="cuda"), 1e-5)
    weights = [(matrix(width * 3 // 2, hidden, False), matrix(hidden, width, False)) for _ in range(LAYERS)]
    product = stream_or_project if batch == 1 else project
    x = torch.randn(batch, hidden, device="cuda").bfloat16()

    def layers(attention: Attend) -> Callable[[int], None]:
        def launch(i: int) -> None:
            before, behind = weights[i % LAYERS]
            qkv, _ = product(x, before, None, "none", Prologue(norm))
            product(attention(*split(qkv, heads), step.layer(i)), behind, None, "none", None)

        return launch

    rope = Rope(5e5, heads.head_dim)
    bare, three, one = (
        microseconds(layers(each))
        for each in (lambda q, *_: q, by_three(heads, rope), by_one(heads, rope, longest=context))
    )
    return bare, three - bare, one - bare


def main() -> int:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--context", type=int, default=1100)
    parser.add_argument("--no-check", action="store_true", help="only time")
    options = parser.parse_args()
    if not options.no_check and not check():
        return 1
    for batch in options.batch:
        bare, three, one = beyond(options.model, batch, options.context)
        shape = f"{options.model} B={batch} context {options.context}"
        print(f"{shape}: three kernels +{three:.2f} us, one +{one:.2f}, to {bare:.2f} of projections", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
