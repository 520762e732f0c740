"""Every fast kernel of a model's plans against float64, on fresh random rows over poisoned outputs.

One record of each kind is run alone, with the model's own weights, in steps of one row, eight, an odd number and
prompts; what it stands for is computed by the references of its plain ops in float64 from the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokenspeed.bench.verify.backends import REFERENCES, Records, signature
from tokenspeed.bench.verify.plain import PlainOps, Tensors
from tokenspeed.bench.verify.steps import Step, random_step
from tokenspeed.bench.verify.table import Figure, Row
from tokenspeed.bench.verify.weights import Values
from tokenspeed.ops.definitions import Shape
from tokenspeed.ops.reference import StepView, choices, shares_of
from tokenspeed.program.plan import Planned
from tokenspeed.program.program import Program, Record
from tokenspeed.runner.arena import PageShape

HEAD_ROWS = (1, 5, 8, 67)
DECODES = (("1 row", (601,)), ("8 rows", tuple(range(310, 318))), ("5 uneven rows", (0, 1, 17, 902, 63)))
PROMPTS = (("a prompt of 13 and a row", ((0, 13), (40, 1))), ("67 tokens", ((0, 66), (31, 1))))
LARGE = (("517 tokens", ((0, 259), (70, 252), (33, 1), (5, 5))), ("a far row", ((5003, 1),)))
"""Steps: tokens before of rows that feed one; tokens before and tokens fed."""


class Allowed(NamedTuple):
    """Of the difference to float64: its root mean square over that of a row's values, and the largest over |exact| plus
    that."""

    rms: float
    largest: float


UNSEEN = Allowed(0, 0)
BOUNDS = {
    torch.bfloat16: Allowed(0.008, 0.05),
    torch.float16: Allowed(0.001, 0.01),
    torch.float32: Allowed(2e-4, 4e-3),
}
"""By the type of activations. bf16: rows are rounded to 2^-9 once or twice in front of a product and once behind it.
float32 stands for the CPU's, whose rows are codes of 16 bits over 32 columns' largest."""
ROUNDED = Allowed(0.06, 0.4)
"""Where kernels round rows to e4m3, by a scale per row."""
STORED = {
    torch.bfloat16: Allowed(0.004, 0.012), torch.float16: Allowed(0.001, 0.004), torch.float32: Allowed(2e-4, 4e-3),
    torch.int8: Allowed(0.01, 0.05), torch.float8_e4m3fn: Allowed(0.05, 0.15),
}  # fmt: skip
"""What is read back from pages: values that lie between two of their type may become either."""
TIE = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-3}
"""By how much the score of a chosen expert may lie below that of one left out."""


@dataclass
class Found:
    """The worst of a kind of record so far."""

    name: str
    by: str
    where: str = ""
    rms: float = 0.0
    largest: float = 0.0
    allowed: Allowed = UNSEEN

    def take(self, where: str, rms: float, largest: float, allowed: Allowed) -> None:
        """Keep what is nearest to its bound, or beyond."""
        share = max(_share(rms, allowed.rms), _share(largest, allowed.largest))
        known = max(_share(self.rms, self.allowed.rms), _share(self.largest, self.allowed.largest))
        if not self.where or share > known:
            self.where, self.rms, self.largest, self.allowed = where, rms, largest, allowed

    def row(self) -> Row:
        figures = (Figure("rms", self.rms, self.allowed.rms), Figure("largest", self.largest, self.allowed.largest))
        return Row("kernels against float64", self.name, self.by, self.where, figures)


def _share(value: float, bound: float) -> float:
    return value / bound if bound and value == value else torch.inf if value else 0.0


def steps_for(shape: PageShape, device: torch.device, vocab: int, context: int, seed: int) -> Iterator[Step]:
    """The random steps that fit the model's context."""
    rng = random.Random(seed)
    plans: list[tuple[str, Sequence[tuple[int, int]]]] = [
        (name, [(before, 1) for before in rows]) for name, rows in DECODES
    ]
    plans += [*PROMPTS, *(LARGE if device.type == "cuda" else ())]
    for name, rows in plans:
        kept = [(min(before, context - 1), fed) for before, fed in rows]
        yield random_step(name, [(b, min(fed, context - b)) for b, fed in kept], shape, device, vocab, rng)


def check_kernels(records: Records, weights: Values, steps: Iterable[Step], seed: int) -> tuple[list[Row], list[str]]:
    """A row per kind of record, and the ops that the reference runs."""
    check = _Check(records, weights, seed)
    for step in steps:
        view = step.view()
        for planned in check.new(records.body(step)):
            check.body(planned, step, view)
    for rows in HEAD_ROWS:
        for planned in check.new(records.head(rows)):
            check.head(planned, rows)
    return [found.row() for found in check.found.values()], sorted(check.plain)


class _Check:
    def __init__(self, records: Records, weights: Values, seed: int) -> None:
        self.records, self.program = records, records.model.program
        self.rng = torch.Generator(records.model.device).manual_seed(seed)
        self.rounds = [PlainOps(weights, torch.float64), PlainOps(weights, torch.float64, rounds=True)]
        self.weights = weights
        self.found: dict[tuple[object, ...], Found] = {}
        self.plain: set[str] = set()

    def new(self, steps: Sequence[Planned]) -> list[Planned]:
        """One record of each kind, of a random layer."""
        kinds: dict[tuple[object, ...], list[Planned]] = {}
        for planned in steps:
            if planned.record.op == "split":
                continue
            if planned.implementation.backend in REFERENCES:
                self.plain.add(planned.record.op)
            else:
                kinds.setdefault(self._kind(planned), []).append(planned)
        at = torch.randint(1 << 30, (len(kinds),), generator=self.rng, device=self.rng.device).tolist()
        return [each[i % len(each)] for i, each in zip(at, kinds.values(), strict=True)]

    def body(self, planned: Planned, step: Step, view: StepView) -> None:
        """A record of a step against float64."""
        inputs = self._inputs(planned.record, step.tokens, view)
        write = next((part for part in planned.record.plain() if part.op == "kv_write"), None)
        place = view.places[write.attrs["layer"]] if write else (0, 0)
        before = step.arena.kv.view(torch.uint8).clone() if write else None
        if write:
            step.poison_own(*place)
        made = self.records.run(planned, inputs)
        written = step.own_entries(*place) if write else None
        if before is not None and not step.others_untouched(before, *place):
            self._found(planned).take(
                f"{step.name}: entries of other tokens changed", torch.inf, torch.inf, STORED[torch.float32]
            )
        self._compare(planned, step.name, view, inputs, made)
        if written is not None:
            kept = Allowed(*map(max, STORED[step.arena.kv.dtype], self._allowed(planned.record)))
            self._found(planned).take(f"{step.name}, pages", *errors(written, step.own_entries(*place)), kept)

    def head(self, planned: Planned, rows: int) -> None:
        """A record behind the selection."""
        inputs = self._inputs(planned.record, rows, None)
        self._compare(planned, f"{rows} rows of the head", None, inputs, self.records.run(planned, inputs))

    def _compare(self, planned: Planned, where: str, view: StepView | None, inputs: Tensors, made: Tensors) -> None:
        record = planned.record
        exact = [self._exact(plain, record, view, inputs) for plain in self._ways(record)]
        route = next((part for part in record.plain() if part.op == "route"), None)
        for value, y in made.items():
            if route is not None and value in route.outputs:
                continue
            worst = min((errors(y, each[value]) for each in exact), key=lambda pair: pair[0])
            self._found(planned).take(where, *worst, self._allowed(record))
        if route is not None:
            self._compare_choice(planned, where, route, made, exact[0])

    def _compare_choice(self, planned: Planned, where: str, route: Record, made: Tensors, exact: Tensors) -> None:
        """Chosen experts by their scores, and their weights as of what was chosen."""
        logits = exact[route.inputs[0]]
        bias = [self.weights.vector(name) for name in route.weights]
        ids, shares = (made[value] for value in route.outputs)
        scores, chosen = choices(logits, bias, route.attrs), ids.long().clamp(0, logits.shape[-1] - 1)
        best = scores.topk(chosen.shape[-1]).values
        missed = best[:, -1:] - scores.gather(-1, chosen)
        twice = (chosen.sort(-1).values.diff(dim=-1) == 0).any()
        tie = TIE[self.records.dtype] * float(1 + logits.abs().max())
        gap = torch.inf if bool(twice) or not torch.equal(chosen, ids.long()) else max(0.0, float(missed.max()))
        self._found(planned).take(f"{where}, choice", gap, gap, Allowed(tie, tie))
        self._found(planned).take(
            f"{where}, shares", *errors(shares, shares_of(logits, chosen, route.attrs)), self._allowed(planned.record)
        )

    def _ways(self, record: Record) -> list[PlainOps]:
        """Plain, and with rows rounded to e4m3 where kernels may do either."""
        return self.rounds if self._rounds(record) else self.rounds[:1]

    def _rounds(self, record: Record) -> bool:
        matrices = [part.weights[0] for part in record.plain() if part.op in ("linear", "experts")]
        return any(self.weights.rounds_rows(name) for name in matrices)

    def _allowed(self, record: Record) -> Allowed:
        plain = BOUNDS[self.records.dtype]
        return ROUNDED if self._rounds(record) else plain

    def _exact(self, plain: PlainOps, record: Record, view: StepView | None, inputs: Tensors) -> Tensors:
        values = {v: x.double() if x.is_floating_point() else x for v, x in inputs.items()}
        plain.run(record, view, values)  # type: ignore[arg-type]
        return values

    def _inputs(self, record: Record, rows: int, view: StepView | None) -> Tensors:
        """Random rows of different size; for what chooses experts, ids and shares."""
        made: Tensors = {}
        tokens = self.program.inputs["tokens"]
        for place, value in enumerate(record.inputs):
            shape = self.program.shapes[value]
            if value == tokens:
                assert view is not None
                made[value] = view.tokens
            elif not shape:
                assert view is not None
                _, index = view.places[record.attrs["layer"]]
                made[value] = view.kv[:, index]
            elif record.op == "experts" and place:
                made[value] = self._chosen(record, shape, rows, place == 1)
            else:
                made[value] = self._random(rows, int(shape[-1]))
        return made

    def _random(self, rows: int, cols: int) -> torch.Tensor:
        device = self.rng.device
        x = torch.randn(rows, cols, generator=self.rng, device=device)
        sizes = 2.0 ** torch.randint(-2, 2, (rows, 1), generator=self.rng, device=device)
        return (x * sizes).to(self.records.dtype)

    def _chosen(self, record: Record, shape: Shape, rows: int, ids: bool) -> torch.Tensor:
        experts, k = self.program.weight_shapes[record.weights[0]][0], int(shape[-1])
        scores = torch.rand(rows, experts, generator=self.rng, device=self.rng.device)
        return scores.topk(k).indices.int() if ids else scores[:, :k].softmax(-1)

    def _kind(self, planned: Planned) -> tuple[object, ...]:
        return signature(planned, self.program, self.records.formats)

    def _found(self, planned: Planned) -> Found:
        kind = self._kind(planned)
        if kind not in self.found:
            self.found[kind] = Found(describe(planned, self.program, self.records), f"{self.records.by}")
            if planned.implementation.name != "walk":
                self.found[kind].by = planned.implementation.name
        return self.found[kind]


def errors(y: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Root mean square of the difference over that of the row's exact values; and the largest difference over |exact|
    plus that."""
    found, wanted = y.double().flatten(1), exact.double().flatten(1)
    size = wanted.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    off = (found - wanted).abs()
    relative = float((off / size).square().mean().sqrt())
    return relative, float((off / (wanted.abs() + size)).nan_to_num(torch.inf).max())


def describe(planned: Planned, program: Program, records: Records) -> str:
    """Op, the matrix or the heads, and its format."""
    record = planned.record
    shapes = {name: program.weight_shapes[name] for name in record.weights}
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    if matrices:
        formats = "+".join(records.formats.get(matrices[0], ()))
        return f"{record.op} {'x'.join(map(str, shapes[matrices[0]]))} {formats}"
    for part in record.plain():
        if "head_dim" in part.attrs and "heads" in part.attrs:
            window = f" window {part.attrs['window']}" if part.attrs["window"] else ""
            return f"{record.op} {part.attrs['heads']}/{part.attrs['kv_heads']}x{part.attrs['head_dim']}{window}"
    return f"{record.op} {int(program.shapes[record.inputs[0]][-1])}"
