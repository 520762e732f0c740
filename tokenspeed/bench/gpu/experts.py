"""Routers and experts on a GPU: `python -m tokenspeed.bench.gpu.experts --check`, and without --check their times.

--check compares with float64 on fresh random data, over memory that shows what nobody wrote: every activation, format
and number of tokens; it ends with status 1 where one is wrong. Times are those of a layer of Qwen3-30B-A3B, or in
MXFP4 of gpt-oss-20b, in a CUDA graph, its experts chosen by uniform noise that differs from launch to launch, over
weights that the second-level cache cannot hold; bytes are those of the experts that were touched, and a floor is the
time that these take at the read ceiling. --format says what is checked or timed, --tiles times candidates for the tile
rules.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenspeed.bench.gpu.expert_candidates import (
    choice_candidates,
    packed_candidates,
    packed_choice_candidates,
    product_candidates,
)
from tokenspeed.bench.gpu.expert_cases import Asked, ExpertCase, exact, poisoned, worst_error
from tokenspeed.bench.gpu.graph_timing import CEILING_GBS, Case, Launch, print_table, write_timed
from tokenspeed.kernels.cuda.experts import stream_experts
from tokenspeed.kernels.cuda.experts_packed import stream_packed
from tokenspeed.kernels.cuda.experts_tall import MOST_TOKENS, multiply_experts
from tokenspeed.kernels.cuda.registration import hopper, route_by_either, stream_or_run, usable
from tokenspeed.kernels.cuda.router import MOST_TOKENS as MOST_ROUTED_TOKENS
from tokenspeed.kernels.triton.expert_operands import ACTS, Experts
from tokenspeed.kernels.triton.expert_registration import SAME_ROWS, product_tile_of
from tokenspeed.kernels.triton.expert_tiles import by_choice
from tokenspeed.kernels.triton.experts import experts_by_choice, experts_in_blocks, run_experts
from tokenspeed.kernels.triton.linear import project
from tokenspeed.kernels.triton.norm import norm_rows
from tokenspeed.kernels.triton.operands import Norm, Prologue
from tokenspeed.kernels.triton.packed_experts import packed_by_choice, packed_in_blocks
from tokenspeed.kernels.triton.route import Noise, route
from tokenspeed.ops.reference import REFERENCE

TOKENS = (1, 2, 3, 8, 17, 64, 300)
SMALL = ExpertCase(24, 4, 360, 200)
SMALL_RUNS = ExpertCase(24, 4, 416, 224)
"""The same in whole blocks of 32 columns."""
QWEN = ExpertCase(128, 8, 2048, 768)
ROUTED = (torch.float32, torch.bfloat16)
GPT_OSS = ExpertCase(32, 4, 2880, 2880, "swiglu_clamped", True)
MODELS = {"bf16": ("qwen3-30b-a3b", QWEN), "fp8": ("qwen3-30b-a3b", QWEN), "mxfp4": ("gpt-oss-20b", GPT_OSS)}
"""Whose layer is timed, by format."""
FORMATS = {"bf16": "plain", "fp8": "channel", "mxfp4": "mxfp4"}
CHECKED = {"bf16": ("plain",), "fp8": ("channel", "block"), "mxfp4": ("mxfp4",)}
BYTES = {"bf16": 2.0, "fp8": 1.0, "mxfp4": 17 / 32}
"""Of a weight."""
ATTRS: dict[str, Any] = {"k": 8, "score": "softmax", "renormalize": True, "groups": 1, "kept_groups": 1, "scale": 1.0}
ROUTERS: tuple[tuple[int, bool, dict[str, Any]], ...] = (
    (128, False, {}),
    (37, False, {"k": 5, "renormalize": False, "scale": 1.7}),
    (32, False, {"k": 4, "score": "logits"}),
    (256, True, {"score": "sigmoid"}),
    (256, True, {"score": "sigmoid", "groups": 8, "kept_groups": 4, "scale": 2.5}),
    (512, False, {"k": 10}),
)
"""Experts, whether with a correction, and what differs from ATTRS."""
STREAMED = (stream_packed, stream_experts, multiply_experts)
"""The last rounds rows to e4m3 by such weights, as Triton's kernels do."""
LAYERS, SETS = 4, 64
"""Weights that take turns, and choices."""


def check(device: str = "cuda", tokens: Sequence[int] = TOKENS, formats: Sequence[str] = tuple(FORMATS)) -> bool:
    """Everything against float64; says what is wrong. formats: of weights."""
    g = torch.Generator(device).manual_seed(torch.seed() % (1 << 40))
    results = [_right_route(g, *router, count) for router in ROUTERS for count in tokens]
    few = [count for count in tokens if count <= MOST_ROUTED_TOKENS]
    results += [_right_router(g, count, QWEN.hidden, dtype) for count in few for dtype in ROUTED]
    for act in ACTS:
        for fmt in (each for name in formats for each in CHECKED[name]):
            small = SMALL_RUNS if fmt == "mxfp4" else SMALL
            case = replace(small, act=act, biased=act == "swiglu_clamped", fmt=fmt)
            results += [_right(case, count, g) for count in tokens]
    if device != "cpu":
        results += [_right(replace(MODELS[fmt][1], fmt=FORMATS[fmt]), count, g) for fmt in formats
                    for count in (1, 2, 8, 32, 128, 1500)]  # fmt: skip
    return all(results)


def _right(case: ExpertCase, tokens: int, g: torch.Generator) -> bool:
    """By the usual kernels and by those of batch-invariant mode, twice; the latter beside fewer others, too."""
    given, asked = case.random(g), case.choices(tokens, g, padding=tokens // 8)
    wanted, same = exact(*asked, given), partial(run_experts, tile=product_tile_of(SAME_ROWS, given.gate_up))
    good, text = True, []
    for run in (run_experts, same):
        with poisoned():
            first, second = run(*asked, given), run(*asked, given)
        error = worst_error(first, wanted)
        good &= error < case.tolerance and torch.equal(first, second)
        text.append(f"{error:.5f}")
    some = torch.randperm(tokens, generator=g, device=g.device)[: max(1, tokens // 3)]
    x, ids, shares = (each[some] for each in asked)
    alike = torch.equal(same(x, ids, shares, given), second[some])
    good &= _right_streamed(case, asked, given, text)
    verdict = "ok" if good and alike else "WRONG" if not good else "DIFFERENT BITS"
    print(f"{verdict:14} {' '.join(text)} of {case.tolerance}  experts {case} {tokens} tokens", flush=True)
    return good and alike


def _right_streamed(case: ExpertCase, asked: Asked, given: Experts, text: list[str]) -> bool:
    """By each of the CUDA kernels that take these, twice; says their errors."""
    good = True
    for run in STREAMED if usable() else ():
        rounds = run is multiply_experts
        if rounds and not hopper():
            continue
        with poisoned():
            first, second = run(*asked, given), run(*asked, given)
        if first is None or second is None:
            continue
        error = worst_error(first, exact(*asked, given, rounds=rounds))
        text.append(f"{run.__name__} {error:.5f}")
        good &= error < (case.tolerance if rounds else case.plain_tolerance) and torch.equal(first, second)
    return good


def _right_route(g: torch.Generator, experts: int, biased: bool, changes: dict[str, Any], tokens: int) -> bool:
    """Ids as the reference has them, ties included, and weights near to it; padding chooses nobody."""
    logits = torch.randn(tokens, experts, generator=g, device=g.device).bfloat16()
    bias = 0.3 * torch.randn(experts, generator=g, device=g.device) if biased else None
    attrs, nothing = ATTRS | changes, None
    slots = torch.arange(tokens, dtype=torch.int32, device=g.device) - 1
    with poisoned():
        ids, shares = route(logits, bias, attrs, slots)
    view: Any = nothing
    wanted = REFERENCE["route"](view, (logits,), () if bias is None else (bias,), attrs)
    good = torch.equal(ids[1:], wanted[0][1:]) and bool((ids[0] == -1).all())
    good &= torch.allclose(shares[1:], wanted[1][1:], rtol=1e-5, atol=1e-7)
    print(f"{'ok' if good else 'WRONG':14} route {experts} {attrs} {tokens} tokens", flush=True)
    return good


def _right_router(g: torch.Generator, tokens: int, hidden: int, dtype: torch.dtype, repeats: int = 50) -> bool:
    """Norm, router and choice in one kernel, whose programs wait for each other: the best of float64's scores where
    they are clearly so, and the same bits each time. Of float32 by Triton, of bf16 by CUDA where it can."""
    experts, k = 128, ATTRS["k"]
    x, weight = (torch.randn(n, hidden, generator=g, device=g.device).to(dtype) for n in (tokens, experts))
    prologue = Prologue(Norm(torch.ones(hidden, device=g.device), 1e-6), x.flip(1))
    slots = torch.arange(tokens, dtype=torch.int32, device=g.device)
    with poisoned():
        found = [route_by_either(x, prologue, weight / hidden, None, None, ATTRS, slots) for _ in range(repeats)]
    scores = found[0].normed.double() @ (weight / hidden).double().T
    best = scores.sort(dim=-1, descending=True)
    apart = best.values[:, :k] - best.values[:, 1 : k + 1]
    clear = apart.amin(1) > (1e-5 if dtype == torch.float32 else 2**-7) * best.values[:, 0]
    good = torch.equal(found[0].ids[clear].long(), best.indices[clear, :k])
    shares = scores.softmax(-1).gather(1, found[0].ids.long())
    good &= torch.allclose(found[0].shares.double(), shares / shares.sum(1, keepdim=True), rtol=1e-2)
    first = found[0]
    good &= all(torch.equal(first.ids, each.ids) and torch.equal(first.shares, each.shares) for each in found)
    print(f"{'ok' if good else 'WRONG':14} router, {dtype}, {tokens} tokens, {int(clear.sum())} clear", flush=True)
    return good


@dataclass(frozen=True)
class Turns:
    """Layers of one format, and choices of `tokens` tokens, that take turns. distinct: experts of a launch's choices,
    on average."""

    layers: list[Experts]
    asked: list[Asked]
    distinct: float

    def launch(self, run: Callable[..., object]) -> Launch:
        """run(x, ids, shares, experts), with other weights and choices each time."""
        return lambda i: run(*self.asked[i % len(self.asked)], self.layers[i % len(self.layers)])


def turns(case: ExpertCase, tokens: int, layers: list[Experts], g: torch.Generator) -> Turns:
    """Choices by uniform noise."""
    attrs = ATTRS | {"k": case.k}
    x = torch.randn(tokens, case.hidden, generator=g, device=g.device).to(case.dtype)
    noise = [torch.rand(tokens, case.experts, generator=g, device=g.device) for _ in range(SETS)]
    asked = [(x, *route(each, None, attrs)) for each in noise]
    return Turns(layers, asked, sum(ids.unique().numel() for _, ids, _ in asked) / SETS)


def cases(
    tokens: Sequence[int],
    formats: Sequence[str],
    tiles: bool,
    device: str = "cuda",
    models: Mapping[str, tuple[str, ExpertCase]] = MODELS,
) -> Iterator[Case]:
    """Experts alone, and the whole block with norm and router; with `tiles` every candidate."""
    g = torch.Generator(device).manual_seed(7)
    for fmt in formats:
        case = replace(models[fmt][1], fmt=FORMATS[fmt])
        layers = [case.random(g) for _ in range(LAYERS)]
        for count in tokens:
            yield from _cases(case, f"{models[fmt][0]} {fmt}", BYTES[fmt], turns(case, count, layers, g), tiles)


def _cases(case: ExpertCase, name: str, item: float, given: Turns, tiles: bool) -> Iterator[Case]:
    """item: bytes of a weight."""
    tokens = len(given.asked[0][0])
    moved = given.distinct * 3 * case.ff * case.hidden * item
    flops = 2.0 * tokens * case.k * 3 * case.ff * case.hidden
    floor = moved / CEILING_GBS / 1e3
    stem = f"{name} B{tokens} ({given.distinct:.1f} distinct, floor {floor:.1f} us)"

    def made(name: str, run: Callable[..., object]) -> Case:
        return Case(f"{stem} {name}", moved, flops, lambda: given.launch(run))

    yield made("experts", run_experts)
    if tokens <= MOST_TOKENS and usable():
        yield made("experts, streamed where they can be", stream_or_run)
    yield Case(f"{stem} block", moved + 2 * case.experts * case.hidden, flops, lambda: _block(case, given))
    if not tiles:
        return
    if case.fmt == "mxfp4":
        yield from _packed_tiles(tokens, made)
        return
    if tokens <= 8 or by_choice(tokens, case.experts, case.k):
        for first, second in choice_candidates():
            yield made(f"by choice {first} {second}", partial(experts_by_choice, first=first, second=second))
    for tile in product_candidates(tokens, int(item)):
        yield made(f"in blocks {tile}", partial(experts_in_blocks, tile=tile))


def _packed_tiles(tokens: int, made: Callable[[str, Callable[..., object]], Case]) -> Iterator[Case]:
    if tokens <= 8:
        for first, second, splits in packed_choice_candidates():
            run = partial(packed_by_choice, first=first, second=second, splits=splits)
            yield made(f"by choice {first} {second} {splits}", run)
    for tile in packed_candidates(tokens):
        yield made(f"in blocks {tile}", partial(packed_in_blocks, tile=tile))


def _block(case: ExpertCase, given: Turns) -> Launch:
    """Join, norm, router, in whose place noise chooses, and experts: what a layer has of it."""
    device = given.asked[0][0].device
    norm, attrs = Norm(torch.ones(case.hidden, device=device), 1e-6), ATTRS | {"k": case.k}
    routers = [torch.randn(case.experts, case.hidden, device=device).to(case.dtype) for _ in range(LAYERS)]

    x = given.asked[0][0]
    slots = torch.arange(len(x), dtype=torch.int32, device=device)
    at = [slots + i * len(x) for i in range(SETS)]

    def together(i: int) -> object:
        noise = Noise(at[i % SETS], i)
        found = route_by_either(x, Prologue(norm, x), routers[i % LAYERS], None, None, attrs, slots, noise)
        return run_experts(found.normed, found.ids, found.shares, given.layers[i % LAYERS])

    def apart(i: int) -> object:
        rows, _ = norm_rows(x, norm, x)
        scores, _ = project(rows.values, routers[i % LAYERS])
        chosen = route(scores, None, attrs, slots, Noise(at[i % SETS], i))
        return run_experts(rows.values, *chosen, given.layers[i % LAYERS])

    return together if len(x) <= MOST_ROUTED_TOKENS else apart


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, or time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with float64, and time nothing")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128], metavar="N")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tiles", action="store_true", help="every candidate tile")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of records to add to")
    options = parser.parse_args(arguments)
    if options.check:
        return 0 if check(formats=options.format) else 1
    with torch.inference_mode():
        timed = print_table(cases(options.tokens, options.format, options.tiles))
    if options.out is not None:
        write_timed(options.out, "experts", [(case.name, case.bytes, us) for case, us in timed])
    return 0


if __name__ == "__main__":
    sys.exit(main())
