"""The measurement of loading, with a tiny model on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open

from tests.seeds import SEED
from tests.tiny_llama import CONFIG, tensor_shapes
from tokenspeed.bench import record
from tokenspeed.bench.__main__ import main
from tokenspeed.bench.gpu import loading, random_checkpoint
from tokenspeed.bench.gpu.random_checkpoint import checkpoint_bytes, resized, write_checkpoint
from tokenspeed.bench.gpu.targets import target_of
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.formats.safetensors import open_safetensors
from tokenspeed.models.registry import define_from_hf, shipped_configs
from tokenspeed.weights.loader import load_weights


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_checkpoint, "BLOCK_VALUES", 1001)


@pytest.mark.parametrize("shard_bytes", [1, 5000, 1 << 30])
def test_a_checkpoint_as_transformers_writes_it(tmp_path: Path, shard_bytes: int) -> None:
    nbytes = write_checkpoint(tmp_path, CONFIG, SEED, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert len(tensors) == 1 or sum(each.nbytes for each in tensors.values()) <= shard_bytes
        found |= tensors
    assert {name: tuple(each.shape) for name, each in found.items()} == tensor_shapes()
    assert nbytes == checkpoint_bytes(CONFIG) == sum(each.nbytes for each in found.values())
    values = torch.cat([each.float().flatten() for each in found.values()])
    assert values.isfinite().all()
    assert len(values.unique()) > 100
    assert open_safetensors(tmp_path).tensors.keys() == found.keys()


def test_layers_come_near_to_a_size() -> None:
    large = shipped_configs()["llama-3.1-8b"]
    assert resized(large, 16e9)["num_hidden_layers"] == large["num_hidden_layers"] == 32
    assert checkpoint_bytes(large) == pytest.approx(16.06e9, rel=1e-3)
    assert resized(large, 2.6e9)["num_hidden_layers"] == 1
    with pytest.raises(ConfigError, match=r"1 GB: this model with one layer takes 2\.54 GB"):
        resized(large, 1e9)


def test_loading(tmp_path: Path) -> None:
    model, out, room = tmp_path / "model", tmp_path / "cpu.json", tmp_path / "room"
    for folder in (model, room):
        folder.mkdir()
    write_checkpoint(model, CONFIG, SEED)
    given = "loading", "--model", str(model), "--device", "cpu", "--out", str(out), "--dir", str(room)
    assert main(given) == 0
    found = {each.id: each for each in record.read(out)}
    read, load, share = (found[f"cpu.loading.{name}"] for name in ("read_gbs", "load_gbs", "load_share"))
    assert read.value == max(read.samples["by_setting"])
    assert load.value == sorted(load.samples["gb_per_s"])[loading.RUNS // 2]
    whole = [sum(parts) for parts in zip(*(load.samples[part] for part in ("open", "copy", "rest")), strict=True)]
    assert [each * seconds for each, seconds in zip(load.samples["gb_per_s"], whole, strict=True)] == pytest.approx(
        [checkpoint_bytes(CONFIG) / 1e9] * loading.RUNS
    )
    assert share.value == pytest.approx(load.value / read.value)
    assert found["cpu.loading.kept_gbs"].value > 0
    assert not list(room.iterdir()), "files were left"
    target = target_of("h200.loading.load_share")
    assert target is not None
    assert target.at_least == 0.7


def test_no_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=3, f_frsize=4096))
    with pytest.raises(ConfigError, match=r"has 0\.0 GB free, the checkpoint takes"):
        loading.run_loading("llama-3.2-1b", "cpu", cast(Any, None), tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_differs_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, SEED)
    packed = load_weights(open_safetensors(tmp_path), define_from_hf(CONFIG).weights)
    weights = {name: weight.unpacked(torch.bfloat16) for name, weight in packed.items() if "norm" not in name}
    weights |= {name: weight.unpacked(torch.float32) for name, weight in packed.items() if "norm" in name}
    backend = cast(Any, SimpleNamespace(weights=weights))
    loading._compare(backend, packed)
    weights["layers.1.down"][-1, 3] += 1
    with pytest.raises(ConfigError, match=r"weight layers\.1\.down is not what the file says"):
        loading._compare(backend, packed)
