"""Matrices of every layout, written by the tests' own loops: their values, and those of the narrow types that hold
them, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.quantized_files import METHODS, Method, awq, gptq, packed
from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.formats.quantized.layout import Layout
from tokenspeed.formats.quantized.read import read_quantization
from tokenspeed.quantization.codes import Codes
from tokenspeed.quantization.hold import held_mode, hold
from tokenspeed.quantization.int4 import Int4Weight
from tokenspeed.quantization.layouts import read_codes
from tokenspeed.quantization.narrow import FORMATS

HELD = {
    "fp8-block": "fp8",
    "fp8-block-bf16-scales": "fp8",
    "fp8-tensor": "fp8",
    "ct-fp8-channel": "fp8",
    "ct-fp8-tensor": "fp8",
    "ct-fp8-block": "fp8",
    "ct-int8-channel": "int8",
    "ct-int4-128": "int4",
    "ct-int4-32": "int4",
    "ct-int4-zeros": "int4",
    "ct-int4-channel": "int4",
    "ct-int8-packed": "int8",
    "gptq": "int4",
    "gptq-zeros": "int4",
    "gptq-v2": "int4",
    "gptq-row": "int4",
    "awq": "int4",
    "awq-64": "int4",
    "modelopt-fp8": "fp8",
}


def layout_of(method: Method) -> Layout:
    found = read_quantization({"quantization_config": method.config})
    assert found is not None
    layout = found.layout_of("model.layers.0.mlp.up_proj")
    assert layout is not None
    return layout


def read(name: str, rows: int, cols: int, seed: int = SEED) -> tuple[Codes, torch.Tensor]:
    """What is read of a random matrix, and its values."""
    tensors, values = METHODS[name].draw(rows, cols, np.random.default_rng(seed))
    return read_codes(layout_of(METHODS[name]), tensors, rows, cols), torch.from_numpy(values)


@pytest.mark.parametrize("name", METHODS)
def test_values(name: str) -> None:
    """In float64 as the layout's definition has them; in float32 and bfloat16 rounded once, of NVFP4 twice."""
    codes, values = read(name, 24 * 8 + 8, 384)
    wide = codes.values(torch.float64)
    assert wide.shape == values.shape
    # A product of e4m3 and float32 scales is kept in float32.
    assert torch.allclose(wide, values, rtol=2**-24 if "nvfp4" in name else 0, atol=0)
    for dtype in (torch.float32, torch.bfloat16):
        error = (codes.values(dtype).double() - values).abs()
        assert (error <= values.abs() * torch.finfo(dtype).eps * (1.02 if "nvfp4" in name else 0.51)).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_type_that_holds_them_has_their_values(name: str) -> None:
    rows = (256, 128, 72)
    parts = [read(name, count, 384, SEED + count) for count in rows]
    mode = held_mode(layout_of(METHODS[name]).grid, 384)
    assert mode == HELD.get(name, "")
    if not mode:
        return
    made = hold([codes for codes, _ in parts])
    wanted = torch.cat([values for _, values in parts])
    assert tuple(made.shape) == (sum(rows), 384)
    assert FORMATS[mode] == {"fp8": "F8_E4M3", "int8": "I8", "int4": "I4_G128"}[mode]
    if mode == "fp8":
        assert (made.dequantized(torch.float32) == torch.cat([c.values(torch.float32) for c, _ in parts])).all()
    else:
        assert (made.dequantized(torch.float64) == wanted).all()


def test_parts_with_other_groups_scales_and_zero_points_are_one_weight() -> None:
    """Groups of 32, of 384 and of 128; scales of float16 and bfloat16; with zero points and without."""
    parts = [read(name, 64, 384, SEED + i) for i, name in enumerate(("gptq-zeros", "ct-int4-channel", "ct-int4-128"))]
    made = hold([codes for codes, _ in parts])
    assert isinstance(made, Int4Weight)
    assert (made.scale.dtype, tuple(made.scale.shape)) == (torch.float32, (3, 192, 4))
    assert (made.dequantized(torch.float64) == torch.cat([values for _, values in parts])).all()


@pytest.mark.parametrize("cols", [64, 96, 320])
def test_columns_that_are_no_runs_of_128_are_held_by_no_type_of_four_bits(cols: int) -> None:
    codes, values = read("ct-int4-32", 9, cols)
    assert held_mode(layout_of(METHODS["ct-int4-32"]).grid, cols) == ""
    assert (codes.values(torch.float64) == values).all()


@pytest.mark.parametrize("name, draw", [("gptq", gptq(4, 32, True)), ("ct-int4-32", packed(4, 32, False, order=True))])
def test_columns_out_of_order_are_refused_by_name(name: str, draw: object) -> None:
    tensors, _ = draw(64, 128, np.random.default_rng(SEED))  # type: ignore[operator]
    key = "g_idx" if name == "gptq" else "weight_g_idx"
    layout = layout_of(METHODS["gptq-zeros"] if name == "gptq" else METHODS[name])
    read_codes(layout, tensors, 64, 128)
    tensors[key] = tensors[key].flip(0)
    with pytest.raises(UnsupportedError, match=f"{key} is not in order.*act-order"):
        read_codes(layout, tensors, 64, 128)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_point_that_v1_does_not_tell_is_refused(bits: int) -> None:
    method = METHODS["gptq" if bits == 4 else "gptq-8"]
    tensors, _ = method.draw(64, 128, np.random.default_rng(SEED))
    tensors["qzeros"].view(torch.uint8)[0, 3] = 255
    with pytest.raises(UnsupportedError, match=f"zero point of {2**bits} or 0.*'gptq'"):
        read_codes(layout_of(method), tensors, 64, 128)


def test_zero_points_of_symmetric_codes_are_refused_unless_they_are_0() -> None:
    tensors, values = METHODS["ct-int8-channel"].draw(5, 64, np.random.default_rng(SEED))
    layout = layout_of(METHODS["ct-int8-channel"])
    tensors["weight_zero_point"] = torch.zeros(5, 1, dtype=torch.int8)
    assert (read_codes(layout, tensors, 5, 64).values(torch.float64).numpy() == values).all()
    tensors["weight_zero_point"][3] = 1
    with pytest.raises(UnsupportedError, match="zero points other than 0"):
        read_codes(layout, tensors, 5, 64)


def test_awq_orders_its_outputs() -> None:
    """One output of eight at a time differs from 0."""
    for output in range(8):
        tensors, _ = awq(0)(8, 8, np.random.default_rng(SEED))
        tensors["qweight"] = torch.full((8, 1), 15 << 4 * (0, 4, 1, 5, 2, 6, 3, 7)[output], dtype=torch.int64).int()
        tensors["qzeros"] = torch.zeros(1, 1, dtype=torch.int32)
        codes = read_codes(layout_of(METHODS["awq"]), tensors, 8, 8).codes
        assert codes.nonzero()[:, 0].unique().tolist() == [output]


def test_modules_that_are_kept_are_found_by_parts_of_their_names() -> None:
    kept = ["lm_head", "gate", "model.layers.3", "mlp.shared"]
    found = read_quantization({"quantization_config": METHODS["fp8-block"].config | {"modules_to_not_convert": kept}})
    assert found is not None
    base = "model.layers.1.mlp"
    plain = ["lm_head", f"{base}.gate", "model.layers.3.mlp.up_proj", f"{base}.shared.up_proj"]
    quantised = [
        f"{base}.gate_proj",
        "model.layers.31.mlp.up_proj",
        f"{base}.shared_up.x",
        "model.layers.1.self_attn.o",
    ]
    assert [found.layout_of(module) is None for module in plain + quantised] == [True] * 4 + [False] * 4
