"""Dense records of real programs, planned for a GPU and run in the interpreter against their own composition."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from tests.program.random_programs import random_step, random_weights
from tests.program.test_fuse import CONFIG, build
from tests.seeds import SEED
from tokenspeed.kernels import ref
from tokenspeed.kernels.registry import Registry, Situation
from tokenspeed.kernels.triton import dense
from tokenspeed.ops.reference import REFERENCE, StepView
from tokenspeed.program.fuse import fuse
from tokenspeed.program.plan import Plan, plan
from tokenspeed.program.program import Program
from tokenspeed.program.recorder import Recorder
from tokenspeed.quantization.fp8 import FORMAT, Fp8Weight, quantize_fp8


def planned(program: Program, tokens: int, formats: Mapping[str, tuple[str, ...]], fp8: bool = True) -> Plan:
    registry = Registry()
    dense.register(registry, fp8=fp8)
    ref.register(registry)
    return plan(program, registry, Situation("cuda", "float16", tokens, formats))


def names(program: Program, tokens: int, formats: Mapping[str, tuple[str, ...]] | None = None) -> list[str]:
    chosen = [step.implementation.name for step in planned(program, tokens, formats or {}).steps]
    return [name.removeprefix("triton.") for name in chosen if name != "ref"]


def walk(steps: Plan, program: Program, view: StepView, weights: dict[str, torch.Tensor | Fp8Weight]) -> torch.Tensor:
    """Run a plan; every outcome of the dense ops is put back to the reference's, so that errors do not add up."""
    values = {program.inputs["tokens"]: view.tokens}
    plain = {k: w.dequantized(torch.float16) if isinstance(w, Fp8Weight) else w for k, w in weights.items()}
    for step in steps.steps:
        record = step.record
        for part in record.plain():
            tensors, given = [values[v] for v in part.inputs], [plain[name] for name in part.weights]
            values.update(zip(part.outputs, REFERENCE[part.op](view, tensors, given, part.attrs), strict=True))
        if step.implementation.backend == "triton":
            tensors = [values[v] for v in record.inputs]
            got = step.implementation.run(view, record, tensors, [weights[name] for name in record.weights])
            quantized = any(isinstance(weights[name], Fp8Weight) for name in record.weights)
            for value, output in zip(record.outputs, got, strict=True):
                assert_near(output, values[value], 0.06 if quantized else 4e-3)
    return values[program.outputs["logits"]]


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance


def half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | Fp8Weight]:
    return {name: w.half() if w.dim() > 1 else w for name, w in weights.items()}


def check_family(family: str, bucket: int) -> None:
    program = fuse(build(family))
    view = random_step(SEED, layers=CONFIG.num_layers, kv_heads=CONFIG.num_kv_heads, head_dim=CONFIG.head_dim)()
    view.kv = view.kv.half()
    walk(planned(program, bucket, {}), program, view, half(random_weights(program, SEED)))


@pytest.mark.parametrize("family, bucket", [("gemma3", 2), ("qwen2", 512)])
def test_records_give_what_their_parts_give(family: str, bucket: int) -> None:
    check_family(family, bucket)


@pytest.mark.slow
@pytest.mark.parametrize("bucket", [64, 65])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_records_of_every_family(family: str, bucket: int) -> None:
    check_family(family, bucket)


@pytest.mark.parametrize("family", ["qwen2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_records_over_fp8_weights(family: str) -> None:
    program = fuse(build(family))
    view = random_step(SEED, layers=CONFIG.num_layers, kv_heads=CONFIG.num_kv_heads, head_dim=CONFIG.head_dim)()
    view.kv = view.kv.half()
    weights = random_weights(program, SEED)
    packed = {name: quantize_fp8(w) for name, w in weights.items() if "layers" in name and w.dim() == 2}
    formats = dict.fromkeys(packed, (FORMAT,))
    walk(planned(program, 16, formats), program, view, {**half(weights), **packed})


def test_small_buckets_take_fused_records_and_large_ones_their_parts() -> None:
    program = fuse(build("llama"))
    layer = ["norm_linear", "linear", "join_norm_linear_act", "linear"]
    following = ["join_norm_linear", *layer[1:]]
    assert names(program, 64) == ["embed", *layer, *following, "add", "norm_linear"]
    opened = ["join_norm", "linear", "act_mul", "linear"]
    expected = ["embed", "norm", "linear", "linear", *opened, "join_norm", "linear", "linear", *opened]
    assert names(program, 65) == [*expected, "add", "norm", "linear"]


def test_fp8_projections_stay_fused_at_any_size() -> None:
    program = fuse(build("llama"))
    formats = {name: (FORMAT,) for name in program.weight_shapes if name.endswith("gate_up")}
    assert names(program, 4096, formats).count("join_norm_linear_act") == CONFIG.num_layers
    refused = planned(program, 4096, formats, fp8=False)
    assert [s.record.op for s in refused.steps if s.implementation.name == "ref"].count("linear") == CONFIG.num_layers
    assert "embed" not in names(program, 1, {"embed": (FORMAT,)})


def test_other_devices_and_dtypes_are_left_to_others() -> None:
    program = fuse(build("gemma3"))
    registry = Registry()
    dense.register(registry)
    for device, dtype in (("cpu", "float16"), ("cuda", "float64")):
        situation = Situation(device, dtype, 1, {})
        assert all(registry.choose(r.op, program.operands(r), situation) is None for r in program.records)


def test_a_normed_branch_may_come_first_in_the_sum() -> None:
    shapes: dict[str, tuple[int, ...]] = {"table": (37, 64), "first": (64,), "second": (64,), "matrix": (40, 64)}
    g = Recorder(shapes)
    x = g.embed(g.tokens, "table")
    total = g.add(g.norm(x, "first", eps=1e-6), x)
    program = fuse(g.program(logits=g.linear(g.norm(total, "second", eps=1e-6), "matrix"), total=total))
    assert [record.op for record in program.records] == ["embed", "branch_join_norm_linear"]
    view = random_step(SEED, layers=1, kv_heads=1, head_dim=8)()
    walk(planned(program, 2, {}), program, view, half(random_weights(program, SEED)))
