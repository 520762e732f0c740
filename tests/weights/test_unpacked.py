"""A model unpacked by tasks equals each weight unpacked alone."""

from __future__ import annotations

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.weights import unpacked
from tokenspeed.weights.dummy import dummy_weights
from tokenspeed.weights.spec import Source, WeightSpec, WeightTable
from tokenspeed.weights.unpacked import unpack_all


def table() -> WeightTable:
    made = WeightTable()
    for name, shape, kind in (("a", (7, 256), "linear"), ("b", (3,), "vector"), ("c", (101, 512), "embedding")):
        source = (Source(name, shape[0]),)
        made.add(WeightSpec(name, shape, kind, source, source))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [256, 1000, 1 << 24])
def test_equals_each_alone(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "TASK_ELEMENTS", elements)
    weights = dummy_weights(table(), {"a": "Q4_K", "c": "Q8_0"}, seed=SEED)
    threads, seen = torch.get_num_threads(), []
    made = unpack_all(weights, dtype, lambda done, total: seen.append((done, total)))
    assert torch.get_num_threads() == threads
    assert made["b"].dtype == torch.float32
    for name, weight in weights.items():
        alone = weight.unpacked(made[name].dtype)
        assert made[name].dtype == (torch.float32 if name == "b" else dtype)
        assert (made[name] == alone).all()
    total = sum(weight.nbytes for weight in weights.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_failing_task_raises() -> None:
    weights = dummy_weights(table(), "BF16", seed=SEED)
    broken = weights["c"].segments[0]
    object.__setattr__(broken, "fmt", "Q9_9")
    with pytest.raises(Exception, match="Q9_9"):
        unpack_all(weights, torch.float32)
