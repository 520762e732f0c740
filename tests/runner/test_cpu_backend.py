"""The C++ walk against the reference, on random models: every family, mixed steps, windows, page sizes, KV types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from msgspec.structs import replace as replace_struct

from tests.kernels.tiers import TIERS_HERE
from tests.seeds import SEED
from tokenspeed.contracts.step import NewSequence, PageGrant, PlanRow, SamplingRow, StepDelta
from tokenspeed.kernels.cpu.registration import ISA_VARIABLE
from tokenspeed.models.dense import SANDWICH_NORMS, DenseConfig, Family
from tokenspeed.models.dense_weights import dense_weights
from tokenspeed.models.gemma3 import FAMILY as GEMMA3
from tokenspeed.models.llama import FAMILY as LLAMA
from tokenspeed.models.olmo2 import FAMILY as OLMO2
from tokenspeed.models.olmo2 import VARIANT as OLMO2_VARIANT
from tokenspeed.models.qwen2 import FAMILY as QWEN2
from tokenspeed.models.registry import Definition
from tokenspeed.ops.definitions import KvScale
from tokenspeed.ops.kv import decode
from tokenspeed.ops.rope import Rope, no_rope
from tokenspeed.program.fuse import fuse
from tokenspeed.program.kv_scale import with_kv_scales
from tokenspeed.runner.arena import Arena, PageShape
from tokenspeed.runner.backend import Backend
from tokenspeed.runner.cpu_backend import CpuBackend, why_not
from tokenspeed.runner.edits import SampledRow, drawn_plainly
from tokenspeed.runner.inputs import SlotTable
from tokenspeed.runner.layout import page_layout
from tokenspeed.runner.model import LoadedModel
from tokenspeed.runner.ref_backend import RefBackend
from tokenspeed.runner.sampler import sample, sampler_inputs
from tokenspeed.weights.dummy import dummy_weights
from tokenspeed.weights.spec import WeightSpec

GREEDY = SamplingRow(0.0, 0, 1.0, 0)
BASE = DenseConfig(
    vocab_size=203,
    hidden_size=96,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    ff_size=160,
    norm_eps=1e-6,
    context=4096,
    ropes=(Rope(10000.0, 32), Rope(100.0, 32, tuple(1.0 + i for i in range(16))), Rope(10000.0, 16)),
    windows=(0, 0, 0),
    attention_scale=0.2,
    tied=False,
)
VARIANTS: dict[str, tuple[Family, dict[str, Any]]] = {
    "llama": (LLAMA, {}),
    "qwen2": (QWEN2, {"qkv_bias": True}),
    "qwen3": (LLAMA, {"qk_norm": True, "tied": True}),
    "gemma3": (
        GEMMA3,
        {
            "qk_norm": True,
            "norms": SANDWICH_NORMS,
            "act": "gelu_tanh",
            "tied": True,
            "embed_scale": 9.8,
            "windows": (37, 0, 37),
        },
    ),
    "gemma2": (
        GEMMA3,
        {
            "norms": SANDWICH_NORMS,
            "act": "gelu_tanh",
            "tied": True,
            "windows": (37, 0, 37),
            "score_cap": 0.02,
            "logit_cap": 0.3,
        },
    ),
    "olmo2": (OLMO2, OLMO2_VARIANT),
    "biases": (
        LLAMA,
        {
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
            "logits_divisor": 3.0,
            "ropes": (Rope(1e4, 32, scale=1.4), no_rope(32), Rope(1e4, 12, scale=0.7)),
        },
    ),
}


@pytest.fixture(
    autouse=True,
    params=[pytest.param(isa, marks=[pytest.mark.slow] if isa != TIERS_HERE[0] else []) for isa in TIERS_HERE],
)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on every instruction set here, on all but the best one in `make test-full` only."""
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return str(request.param)


def make_model(name: str, formats: str | Mapping[str, str] = "F32", **changes: Any) -> LoadedModel:
    family, variant = VARIANTS[name]
    config = replace(BASE, **variant | changes)
    definition = Definition(family, config, dense_weights(config))
    packed = dummy_weights(definition.weights, formats, seed=SEED)
    for weight in packed.values():
        if weight.spec.kind == "vector":  # far from 1 and 0, so that a missing one shows
            weight.segments[0].data.view(torch.float32).mul_(torch.rand(weight.spec.shape) + 0.5)
    return LoadedModel(definition, fuse(definition.program()), packed, torch.float32, torch.device("cpu"))


class Stepper:
    """Feeds the same steps to a backend of its own pages."""

    def __init__(self, model: LoadedModel, backend: RefBackend | CpuBackend, page_size: int, kv: torch.dtype) -> None:
        config = model.definition.config
        self.layout = page_layout(config.windows)
        shape = PageShape(self.layout, page_size, config.num_kv_heads, config.head_dim, kv)
        self.arena = Arena(4096, shape, model.device)
        self.arena.kv.view(torch.uint8).fill_(0xFF)  # what is read before it is written shows in the logits
        backend.bind(self.arena)
        self.backend: Backend = backend
        self.table = SlotTable(self.arena)
        self.free = torch.randperm(4096, generator=torch.Generator().manual_seed(page_size)).tolist()

    def start(self, slot: int, tokens: list[int], room: int) -> None:
        size = self.arena.shape.page_size
        grants = [
            PageGrant(slot, group, 0, [self.free.pop() for _ in range(-(-room // size))])
            for group in range(len(self.layout.windows))
        ]
        new = NewSequence(slot, tokens, 0, len(tokens), GREEDY)
        self.table.apply(StepDelta(new=[new], grants=grants))

    def step(self, counts: dict[int, int]) -> torch.Tensor:
        """Feed up to `counts` tokens of each slot; logits of every token."""
        fed = self.table.feed([PlanRow(slot, count, 10**6) for slot, count in counts.items()])
        self.backend.body(fed)
        for row in fed:
            row.slot.num_computed += row.count
        return self.backend.logits(list(range(sum(row.count for row in fed)))).clone()


def steppers(
    model: LoadedModel, page_size: int = 16, kv: torch.dtype = torch.float32, threads: int = 2
) -> list[Stepper]:
    return [
        Stepper(model, RefBackend(model), page_size, kv),
        Stepper(model, CpuBackend(model, 2), page_size, kv),
    ]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert error.max() < tolerance, error


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, BASE.vocab_size, (length,), generator=torch.Generator().manual_seed(SEED + seed)).tolist()


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("name", VARIANTS)
def test_mixed_steps(name: str, page_size: int) -> None:
    """A long chunk, decodes and short chunks together, past the window and over several splits of the context."""
    ref, cpu = steppers(make_model(name), page_size)
    for stepper in (ref, cpu):
        for slot, length in ((3, 300), (0, 20), (7, 41)):
            stepper.start(slot, prompt(length, slot), 310)
    for counts in ({3: 290, 0: 19}, {3: 7, 0: 1, 7: 40}, {7: 1, 3: 1}, {3: 2}):
        close(cpu.step(counts), ref.step(counts), 2e-4)


@pytest.mark.parametrize("isa", TIERS_HERE, indirect=True)
def test_every_instruction_set(isa: str) -> None:
    """In `make test` too; feed-forward rows that are no whole tiles."""
    model = make_model("gemma3", {"embed": "Q8_0"}, ff_size=150)
    ref, cpu = steppers(model, kv=torch.bfloat16)
    assert isinstance(cpu.backend, CpuBackend)
    assert cpu.backend.isa == isa
    for stepper in (ref, cpu):
        stepper.start(0, prompt(60), 64)
    close(cpu.step({0: 57}), ref.step({0: 57}), 2e-3)
    close(cpu.step({0: 3}), ref.step({0: 3}), 2e-3)


@pytest.mark.parametrize("fmt", ["BF16", "F16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K"])
def test_formats(fmt: str) -> None:
    changes = {"hidden_size": 256, "ff_size": 256, "head_dim": 64, "num_heads": 4} if fmt.endswith("_K") else {}
    ropes = tuple(Rope(10000.0, 32) for _ in range(3))
    ref, cpu = steppers(make_model("llama", fmt, ropes=ropes, **changes))
    for stepper in (ref, cpu):
        stepper.start(0, prompt(40), 48)
    close(cpu.step({0: 39}), ref.step({0: 39}), 5e-4)
    close(cpu.step({0: 1}), ref.step({0: 1}), 5e-4)


def test_formats_mixed_within_a_projection() -> None:
    """The q, k and v of real files differ in format."""
    model = make_model("gemma3", "Q8_0")
    weight = model.packed["layers.1.qkv"]
    halves = [dummy_weights_of(weight.spec, fmt).segments[0] for fmt in ("Q5_0", "Q8_0")]
    rows = weight.shape[0]
    cut = 64
    segments = [
        replace(halves[0], data=halves[0].data[:cut], rows=cut),
        replace(halves[1], data=halves[1].data[cut:].contiguous(), rows=rows - cut),
    ]
    object.__setattr__(weight, "segments", segments)
    ref, cpu = steppers(model)
    for stepper in (ref, cpu):
        stepper.start(0, prompt(10), 16)
    close(cpu.step({0: 10}), ref.step({0: 10}), 5e-4)


def dummy_weights_of(spec: WeightSpec, fmt: str) -> Any:
    from tokenspeed.weights.spec import WeightTable

    table = WeightTable()
    table.add(spec)
    return dummy_weights(table, fmt, seed=SEED + 9)[spec.name]


@pytest.mark.parametrize(
    "kv, tolerance", [(torch.bfloat16, 5e-3), (torch.int8, 3e-2), (torch.float8_e4m3fn, 8e-2)], ids=str
)
@pytest.mark.parametrize("page_size", [3, 16])
@pytest.mark.parametrize("scaled", [False, True])
def test_narrow_pages(kv: torch.dtype, tolerance: float, page_size: int, scaled: bool) -> None:
    """Both backends store the same values, but for those that lie on the edge between two; nothing else is written."""
    model = make_model("gemma3")
    if scaled:
        scales = {0: KvScale(0.03, 5.0), 2: KvScale(21.0, 0.4)}
        model = replace(model, program=fuse(with_kv_scales(model.definition.program(), scales)))
    ref, cpu = steppers(model, page_size, kv)
    for stepper in (ref, cpu):
        stepper.start(0, prompt(100), 112)
        stepper.start(1, prompt(290, 1), 300)
    for counts in ({0: 99, 1: 280}, {1: 9, 0: 1}):
        close(cpu.step(counts), ref.step(counts), tolerance)
    head_dim = cpu.arena.shape.head_dim
    stored = [stepper.arena.kv for stepper in (cpu, ref)]
    untouched = [(kv.view(torch.uint8) == 0xFF).all(-1) for kv in stored]
    assert (untouched[0] == untouched[1]).all()
    assert 0 < untouched[0].double().mean() < 1
    values, expected = (decode(kv[~untouched[0]], head_dim, torch.float64) for kv in stored)
    assert (values - expected).abs().gt(1e-2 * expected.abs()).double().mean() < 0.04
    assert (values - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("kv", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bits_do_not_depend_on_threads_batch_or_chunks(name: str, kv: torch.dtype) -> None:
    model = make_model(name, "Q8_0")
    logits = []
    for threads, chunks in ((1, [64]), (3, [64]), (2, [1] * 64), (2, [7] * 9 + [1])):
        stepper = Stepper(model, CpuBackend(model, threads), 16, kv)
        stepper.start(0, prompt(64), 64)
        stepper.start(1, prompt(30, 5), 64)
        parts = [stepper.step({0: count} if i else {1: 30, 0: count}) for i, count in enumerate(chunks)]
        parts[0] = parts[0][30:]
        logits.append(torch.cat(parts))
    for other in logits[1:]:
        assert (other == logits[0]).all()


def test_hidden_rows_that_are_no_numbers_are_left_to_the_sampler() -> None:
    model = make_model("llama", {"lm_head": "Q8_0"})
    model.packed["embed"].segments[0].data.view(torch.float32)[7, 5] = float("inf")
    stepper = Stepper(model, CpuBackend(model, 2), 16, torch.bfloat16)
    stepper.start(0, [7], 16)
    stepper.start(1, [8], 16)
    logits = stepper.step({0: 1, 1: 1})
    ask = SampledRow(GREEDY, [], 0, 1)
    assert logits[0].isnan().all()
    assert stepper.backend.pick([1], [ask]) == [int(logits[1].argmax())]
    assert stepper.backend.pick([0, 1], [ask, ask]) is None
    inputs = sampler_inputs([ask, ask], BASE.vocab_size, model.device)
    assert sample(logits, inputs).tokens.tolist() == [0, int(logits[1].argmax())]


@pytest.mark.parametrize("lm_head", ["screened", "full"])
def test_rows_with_filters_are_picked_as_they_are_sampled(lm_head: str) -> None:
    model = make_model("llama", {"lm_head": "Q8_0"})
    stepper = Stepper(model, CpuBackend(model, 2, lm_head), 16, torch.bfloat16)
    for slot in range(4):
        stepper.start(slot, prompt(3, slot), 16)
    logits = stepper.step(dict.fromkeys(range(4), 3))[2::3]
    filters: list[dict[str, Any]] = [{}, {"top_k": 5, "top_p": 0.8}, {"min_p": 0.3}, {"temperature": 0.0}]
    for seed in range(50):
        rows = [
            SampledRow(SamplingRow(**{"temperature": 0.9, "top_k": 0, "top_p": 1.0, "seed": seed} | fields), [], 0, 3)
            for fields in filters
        ]
        assert all(map(drawn_plainly, rows))
        inputs = sampler_inputs(rows, BASE.vocab_size, model.device)
        assert stepper.backend.pick([2, 5, 8, 11], rows) == sample(logits, inputs).tokens.tolist()
    whole = model.packed["lm_head"].nbytes
    read = stepper.backend.weight_bytes["lm_head"]
    assert read == whole if lm_head == "full" else read != whole


def test_what_it_does_not_take_is_named() -> None:
    assert why_not(make_model("llama"), torch.bfloat16) == []
    assert why_not(make_model("llama"), torch.float16) == ["kv_cache_dtype float16"]
    assert why_not(make_model("llama"), torch.int8) == why_not(make_model("llama"), torch.float8_e4m3fn) == []
    odd = make_model("llama", head_dim=24, ropes=tuple(Rope(10000.0, 24) for _ in range(3)))
    assert why_not(odd, torch.bfloat16) == ["head_dim 24"]
    captured = make_model("llama")
    program = fuse(captured.definition.program(capture=("layers.0.o",)))
    assert why_not(replace(captured, program=program), torch.bfloat16) == []
    between = captured.definition.program(adapters={"layers.0.qkv": 4})
    assert why_not(replace(captured, program=fuse(between)), torch.bfloat16) == []


def decoding(model: LoadedModel, threads: int, prompts: list[list[int]]) -> tuple[Stepper, list[list[int]]]:
    """A stepper whose slots know one sampled token, and their known tokens."""
    stepper = Stepper(model, CpuBackend(model, threads), 16, torch.bfloat16)
    known = []
    for slot, tokens in enumerate(prompts):
        stepper.start(slot, tokens, 100)
        token = int(stepper.step({slot: len(tokens)})[-1].argmax())
        stepper.table._slots[slot].append(token)
        known.append([*tokens, token])
    return stepper, known


SAMPLINGS = [
    GREEDY,
    SamplingRow(0.9, 0, 1.0, 77),
    SamplingRow(1.3, 7, 1.0, SEED % 2**63, sample_index=3),
]


def asks_of(known: list[list[int]], stops: tuple[int, ...] = (), top_p: float = 1.0) -> list[SampledRow]:
    rows = [replace_struct(SAMPLINGS[i % 3], stop_ids=list(stops), top_p=top_p) for i in range(len(known))]
    return [SampledRow(row, tokens, 4, len(tokens)) for row, tokens in zip(rows, known, strict=True)]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_passes_draw_what_single_steps_draw(name: str, top_p: float) -> None:
    model = make_model(name, "Q8_0")
    prompts = [prompt(40), prompt(7, 5), prompt(15, 9)]
    stepper, known = decoding(model, 2, prompts)
    fed = stepper.table.feed([PlanRow(slot, 6, len(each) + 5) for slot, each in enumerate(known)])
    passes = stepper.backend.decode(fed, asks_of(known, top_p=top_p), 6)
    assert len(passes) == 6 or top_p < 1  # they end before a draw that is too close to where top_p cuts
    other, known = decoding(model, 1, prompts)
    for drawn in passes:
        logits = other.step(dict.fromkeys(range(3), 1))
        inputs = sampler_inputs(asks_of(known, top_p=top_p), BASE.vocab_size, model.device)
        assert sample(logits, inputs).tokens.tolist() == drawn
        for slot, token in enumerate(drawn):
            other.table._slots[slot].append(token)
            known[slot].append(token)


def test_passes_end_with_a_stop_id_and_before_what_is_not_a_number() -> None:
    model = make_model("llama", {"lm_head": "Q8_0"})
    prompts = [prompt(12), prompt(5, 3)]
    stepper, known = decoding(model, 2, prompts)
    fed = stepper.table.feed([PlanRow(slot, 9, len(each) + 8) for slot, each in enumerate(known)])
    passes = stepper.backend.decode(fed, asks_of(known), 9)
    assert len(passes) == 9
    stop = passes[3][1]
    first = next(i for i, drawn in enumerate(passes) if stop in drawn)
    assert stepper.backend.decode(fed, asks_of(known, (stop,)), 9) == passes[: first + 1]
    seen = {token for tokens in known for token in tokens}
    last, token = next((i, token) for i, drawn in enumerate(passes) for token in drawn if token not in seen)
    model.packed["embed"].segments[0].data.view(torch.float32)[token, 5] = float("nan")
    stepper, known = decoding(model, 2, prompts)
    fed = stepper.table.feed([PlanRow(slot, 9, len(each) + 8) for slot, each in enumerate(known)])
    assert last < 8
    assert stepper.backend.decode(fed, asks_of(known), 9) == passes[: last + 1]


def test_capped_logits_are_drawn_from_by_the_sampler_unless_greedy() -> None:
    """A cap keeps the order of logits, not their distances."""
    model = make_model("gemma2", "Q8_0", logit_cap=3.0)
    stepper, known = decoding(model, 2, [prompt(40), prompt(7, 5)])
    fed = stepper.table.feed([PlanRow(slot, 4, len(each) + 3) for slot, each in enumerate(known)])
    drawn = stepper.backend.decode(fed, asks_of(known), 4)
    assert (drawn, stepper.backend.pick([0], asks_of(known)[1:])) == ([], None)
    greedy = [SampledRow(GREEDY, each, 4, len(each)) for each in known]
    passes = stepper.backend.decode(fed, greedy, 4)
    other, known = decoding(model, 1, [prompt(40), prompt(7, 5)])
    for tokens in passes:
        assert other.step(dict.fromkeys(range(2), 1)).argmax(1).tolist() == tokens
        for slot, token in enumerate(tokens):
            other.table._slots[slot].append(token)
    assert len(passes) == 4
