"""The benchmark of experts without a GPU: its check, its cases, and the uniform router."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.triton import interpreter  # noqa: F401
from tests.kernels.triton.test_moe_models import few_programs, made, open_here  # noqa: F401
from tests.seeds import SEED
from tokenspeed.bench.gpu import expert_cases, experts, uniform_router
from tokenspeed.bench.gpu.expert_cases import ExpertCase
from tokenspeed.bench.gpu.setup import Setup
from tokenspeed.bench.gpu.uniform_router import distinct_experts_of, route_uniformly
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.kernels.triton import expert_registration
from tokenspeed.kernels.triton.route import Noise, route
from tokenspeed.ops.definitions import distinct_experts

ATTRS = experts.ATTRS


def test_the_check_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case, g = ExpertCase(4, 2, 40, 24, dtype=torch.float32), torch.Generator().manual_seed(SEED)
    assert experts._right(case, 3, g)
    assert experts._right_route(g, 12, True, {"k": 2, "score": "sigmoid", "groups": 3, "kept_groups": 2}, 5)
    assert experts._right_router(g, 2, 40, torch.float32, repeats=2)
    assert "WRONG" not in capsys.readouterr().out
    exact = expert_cases.exact
    monkeypatch.setattr(experts, "exact", lambda *given: exact(*given).roll(1, 1))
    assert not experts._right(case, 3, g)
    assert "WRONG" in capsys.readouterr().out


def test_cases_count_the_bytes_of_the_experts_that_are_touched() -> None:
    small = {"fp8": ("tiny", ExpertCase(16, 8, 32, 16))}
    for case in experts.cases([1, 2], ["fp8"], tiles=True, device="cpu", models=small):
        assert case.bytes >= case.flops / 2 / (2 if "B2" in case.name else 1) * 0.4
        if case.name == "tiny fp8 B1 (8.0 distinct, floor 0.0 us) experts":
            assert case.bytes == 8 * 3 * 16 * 32
            assert case.flops == 2 * 8 * 3 * 16 * 32
            assert torch.equal(case.make()(0), case.make()(0))  # type: ignore[arg-type]


def test_cases_of_four_bits() -> None:
    """Their tiles stay those of MXFP4, and 17 bytes hold 32 weights."""
    tiny = {"mxfp4": ("tiny", ExpertCase(8, 2, 64, 32, "swiglu_clamped", True))}
    found = list(experts.cases([1], ["mxfp4"], tiles=True, device="cpu", models=tiny))
    assert found[0].bytes == 2 * 3 * 32 * 64 * 17 / 32
    for case in (found[0], found[1], found[2], found[-1]):
        made = case.make()(0)
        assert isinstance(made, torch.Tensor)
        assert torch.equal(made, case.make()(0))  # type: ignore[arg-type]
    assert any("by choice" in case.name for case in found)
    assert any("in blocks" in case.name for case in found)


def test_uniform_choices_are_distinct_repeatable_and_as_many_as_expected() -> None:
    slots = torch.arange(8, dtype=torch.int32)
    logits, counts = torch.zeros(8, 128), []
    for position in range(4):
        at = torch.full_like(slots, position)
        ids, shares = route(logits, None, ATTRS, slots, Noise(at, 5))
        assert all(len(set(row)) == 8 for row in ids.tolist())
        torch.testing.assert_close(shares.sum(1), torch.ones(8))
        counts.append(ids.unique().numel())
    assert torch.tensor(counts).float().mean() == pytest.approx(distinct_experts(128, 8, 8), rel=0.1)
    assert torch.equal(ids[3:], route(logits[3:], None, ATTRS, slots[3:], Noise(at[3:], 5))[0])
    assert not torch.equal(ids[:1], route(logits[:1], None, ATTRS, slots[:1], Noise(at[:1], 6))[0])
    assert (route(logits[:1], None, ATTRS, slots[:1] - 1, Noise(at[:1], 5))[0] == -1).all()


def test_a_model_chooses_uniformly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_here(monkeypatch, made("qwen3_moe", tmp_path).path)
    monkeypatch.setattr(expert_registration, "FEW_TOKENS", 1)
    asked: list[str] = []

    def counted(name: str, own: Callable[..., Any], *given: Any) -> Any:
        asked.append(name)
        return own(*given)

    for name in ("route", "router_outputs"):
        monkeypatch.setattr(uniform_router, name, partial(counted, name, getattr(uniform_router, name)))
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate(prompt_token_ids=[[3, 9]], sampling_params=params, use_tqdm=False)
    assert not asked
    route_uniformly(llm)
    llm.generate(prompt_token_ids=[[3, 9]], sampling_params=params, use_tqdm=False)
    assert asked == ["route", "router_outputs"]
    assert 3 <= distinct_experts_of(llm, 2, 10) <= 6


def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--router uniform is for GPUs only"):
        Setup(str(made("mixtral", tmp_path).path), device="cpu", router="uniform").open(1, 16)
