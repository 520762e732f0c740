"""Scales of an fp8 KV cache as checkpoints of several makers name them."""

from __future__ import annotations

import random
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch

from tests.seeds import SEED
from tests.weights.test_loader import Memory, plain
from tokenspeed.contracts.errors import UnsupportedError, WeightError
from tokenspeed.weights.kv_scales import KV_SCALE_TENSORS, kv_scales

LAYERS = 3
NAMINGS = {
    "self_attn.{}_scale": ("k", "v"),
    "self_attn.{}_proj.{}_scale": ("k", "v"),
    "self_attn.attn.{}_scale": ("k", "v"),
    "self_attn.kv_scale": ("kv",),
}


def checkpoint(tensors: dict[str, torch.Tensor]) -> Any:
    return Memory("safetensors", {name: plain(each) for name, each in tensors.items()})


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_each_naming(naming: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    draw = random.Random(SEED)
    values = {(i, part): draw.uniform(0.001, 9) for i in range(LAYERS) for part in NAMINGS[naming]}
    names = {key: f"model.layers.{key[0]}.{naming.format(*key[1] * 2)}" for key in values}
    tensors = {names[key]: torch.full(shape, value).to(dtype) for key, value in values.items()}
    other = {"model.layers.0.self_attn.q_scale": torch.ones(()), "model.layers.0.mlp.k_scale": torch.ones(4, 4)}
    found = kv_scales(checkpoint(tensors | other), LAYERS)
    assert all(any(fnmatchcase(name, pattern) for pattern in KV_SCALE_TENSORS) for name in tensors)
    for i in range(LAYERS):
        expected = [float(tensors[names[i, part]]) for part in NAMINGS[naming]]
        assert found[i] == tuple(expected * (2 // len(expected)))
    assert list(found) == list(range(LAYERS))


def test_none() -> None:
    assert kv_scales(checkpoint({"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}), LAYERS) == {}


def scales(count: int = LAYERS) -> dict[str, torch.Tensor]:
    return {f"model.layers.{i}.self_attn.{part}_scale": torch.ones(1) for i in range(count) for part in "kv"}


def test_some_layers_without() -> None:
    lacking = scales()
    del lacking["model.layers.1.self_attn.v_scale"]
    with pytest.raises(WeightError, match=r"has scales of the KV cache, but none for v of layer 1$"):
        kv_scales(checkpoint(lacking), LAYERS)
    with pytest.raises(WeightError, match=r"none for k of layer 3, v of layer 3, .* k of layer 5, ... \(10 in all\)"):
        kv_scales(checkpoint(scales()), 8)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-45])
def test_no_scale(value: float) -> None:
    with pytest.raises(WeightError, match=r"layers\.2\.self_attn\.k_scale' is .*, no scale"):
        kv_scales(checkpoint(scales() | {"model.layers.2.self_attn.k_scale": torch.tensor([value])}), LAYERS)


def test_what_is_not_supported() -> None:
    name = "model.layers.0.self_attn.v_scale"
    with pytest.raises(UnsupportedError, match=r"v_scale' \[4\] of type F32: the KV cache takes one scale per layer"):
        kv_scales(checkpoint(scales() | {name: torch.ones(4)}), LAYERS)
    with pytest.raises(UnsupportedError, match=r"v_scale' \[\] of type I32"):
        kv_scales(checkpoint(scales() | {name: torch.ones((), dtype=torch.int32)}), LAYERS)
    twice = scales() | {"model.layers.0.self_attn.kv_scale": torch.ones(())}
    with pytest.raises(WeightError, match=r"kv_scale' is a second k scale of layer 0"):
        kv_scales(checkpoint(twice), LAYERS)
