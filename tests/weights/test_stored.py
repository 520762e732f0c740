"""Quantised weights of a checkpoint on their way to a device: read ahead, unpacked part by part, released."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.parity_tools import CASES, load
from tests.quantized_files import METHODS, make_mxfp4, make_quantized
from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.weights import ahead, stored
from tokenspeed.weights.ahead import bytes_to, read_ahead
from tokenspeed.weights.stored import is_stored, unpack_stored
from tokenspeed.weights.unpacked import unpack_all

WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1, "head_dim": 32}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def checkpoint(name: str, folder: Path) -> Path:
    if name == "mxfp4":
        return make_mxfp4(CASES["gpt_oss"], folder, SEED).path
    case = CASES["llama"]
    return make_quantized(replace(case, settings=case.settings | WIDE), METHODS[name], folder, SEED).path


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in ("fp8-block", "gptq")]


@pytest.mark.parametrize("elements", [1, 1 << 24])
@pytest.mark.parametrize("name", ["fp8-block", "gptq", "mxfp4", *SLOW])
def test_parts_are_those_of_the_whole(
    name: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut every 128 rows, and not at all."""
    packed = load(checkpoint(name, tmp_path)).packed
    weights = {key: weight for key, weight in packed.items() if is_stored(weight)}
    whole = {key: weight.unpacked(torch.float32) for key, weight in weights.items()}
    monkeypatch.setattr(stored, "PART_ELEMENTS", elements)
    told: list[tuple[int, int]] = []
    found = dict(unpack_stored(weights, torch.float32, torch.device("cpu"), lambda *at: told.append(at)))
    assert list(found) == list(weights)
    assert all((found[key] == values).all() for key, values in whole.items())
    assert all((values == whole[key]).all() for key, values in unpack_all(weights, torch.float32).items())
    total = sum(weight.nbytes for weight in weights.values())
    assert told == sorted(told)
    assert told[-1] == (total, total)


@pytest.mark.parametrize("name", ["fp8-block", "gptq", "mxfp4", *SLOW])
def test_bytes_that_readers_bring_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    """Plain weights among them."""
    packed = load(checkpoint(name, tmp_path)).packed
    found = dict(bytes_to(torch.device("cpu"), packed))
    assert list(found) == list(packed)
    assert any(is_stored(weight) for weight in packed.values())
    for key, weight in packed.items():
        assert type(found[key].segments[0]) is type(weight.segments[0])
        assert all(not segment.views for segment in found[key].segments)
        assert torch.equal(found[key].unpacked(torch.float32), weight.unpacked(torch.float32))
        held = [part.segments[0].data.data_ptr() for part in (found[key], weight)]
        assert weight.spec.kind == "vector" or held[0] != held[1]


@pytest.mark.parametrize("most", [1, 1 << 30])
def test_reading_ahead_keeps_the_order_and_the_bound(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = load(checkpoint("gptq", tmp_path)).packed
    touched: list[int] = []
    monkeypatch.setattr(ahead, "AHEAD_BYTES", most)
    monkeypatch.setattr(ahead, "_touch", lambda part: touched.append(part.nbytes))
    sizes = [sum(view.nbytes for segment in weight.segments for view in segment.views) for weight in packed.values()]
    for number, (name, weight) in enumerate(read_ahead(packed)):
        assert weight is packed[name]
        read = sum(touched)
        assert sum(sizes[: number + 1]) <= read
        assert read <= sum(sizes[: number + 1] if most == 1 else sizes)


@pytest.mark.parametrize("name", ["gptq", "mxfp4"])
def test_released_weights_keep_their_sizes(name: str, tmp_path: Path) -> None:
    model = load(checkpoint(name, tmp_path))
    before = model.file_bytes, model.formats, model.stored
    assert model.stored
    model.release()
    assert (model.file_bytes, model.formats, model.stored) == before
    segments = [segment for weight in model.packed.values() for segment in weight.segments]
    assert all(segment.data.device.type == "meta" and not segment.views for segment in segments)


def test_rows_of_a_layout_have_no_bytes_of_their_own(tmp_path: Path) -> None:
    weight = load(checkpoint("gptq", tmp_path)).packed["layers.0.o"]
    with pytest.raises(UnsupportedError, match=r"o_proj.weight: rows of GPTQ_4"):
        weight.segments[0].rows_at(0, 1)
