"""Quantised checkpoints in the layouts that people download, written from the layouts' definitions with loops of this
file's own, beside the transformers models that hold the values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.parity_cases import Case
from tests.parity_tools import make_safetensors

Array = npt.NDArray[Any]
Drawn = tuple[dict[str, torch.Tensor], Array]
"""Tensors of a matrix by suffix, and its values, float64 [N, K]."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Method:
    """A layout: its quantization_config, and how a matrix [N, K] of random values is drawn in it."""

    config: dict[str, Any]
    draw: Callable[..., Drawn]
    modules: str = r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj"
    """Pattern of the names of quantised modules."""
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors by suffix that each matrix has beside."""


def words(codes: Array, bits: int) -> torch.Tensor:
    """Codes [R, C] to int32 [R, ceil(C bits / 32)], the first in the lowest bits."""
    per = 32 // bits
    out = np.zeros((codes.shape[0], -(-codes.shape[1] // per)), dtype=np.uint32)
    for column in range(codes.shape[1]):
        out[:, column // per] |= codes[:, column].astype(np.uint32) << np.uint32(bits * (column % per))
    return torch.from_numpy(out.view(np.int32))


def floats(values: Array, kind: str) -> tuple[torch.Tensor, Array]:
    """A tensor of some float type, and its values."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(FLOATS[kind])
    return tensor, tensor.double().numpy()


def spread(factors: Array, shape: tuple[int, ...], down: int, across: int) -> Array:
    """Of each element the factor of its block."""
    out = np.empty(shape)
    for row in range(shape[0]):
        for group in range(factors.shape[1]):
            out[row, group * across : (group + 1) * across] = factors[row // down, group]
    return out


def e4m3(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[torch.Tensor, Array]:
    """Random values of standard deviation 100 as e4m3."""
    tensor = torch.from_numpy(rng.normal(0, 100, shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return tensor, tensor.double().numpy()


def draw_scales(shape: tuple[int, ...], spread_of_codes: float, cols: int, rng: np.random.Generator) -> Array:
    """Scales with which a matrix keeps rows of length about 1."""
    return np.exp(rng.normal(0, 0.3, shape)) / (spread_of_codes * cols**0.5)


def fp8(grain: str, scale: str = "weight_scale", kind: str = "F32") -> Callable[..., Drawn]:
    """One scale for the whole, for each row, or for each 128 x 128."""

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Drawn:
        shape, down, across = {
            "tensor": ((1, 1), rows, cols),
            "channel": ((rows, 1), 1, cols),
            "block": ((-(-rows // 128), -(-cols // 128)), 128, 128),
        }[grain]
        weight, q = e4m3((rows, cols), rng)
        factors, read = floats(draw_scales(shape, 100, cols, rng), kind)
        stored = factors.reshape(()) if grain == "tensor" else factors
        return {"weight": weight, scale: stored}, q * spread(read, q.shape, down, across)

    return draw


def int8(group: int, zeros: bool, kind: str = "F32") -> Callable[..., Drawn]:
    """compressed-tensors' int-quantized. group: 0 for a scale per row."""

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Drawn:
        across = group or cols
        q = rng.integers(-128, 128, (rows, cols), dtype=np.int8)
        factors, read = floats(draw_scales((rows, cols // across), 74, cols, rng), kind)
        tensors = {"weight": torch.from_numpy(q), "weight_scale": factors}
        zero: Array = np.zeros(read.shape)
        if zeros:
            zero = rng.integers(-100, 100, read.shape, dtype=np.int8)
            tensors["weight_zero_point"] = torch.from_numpy(zero)
        return tensors, (q - spread(zero, q.shape, 1, across)) * spread(read, q.shape, 1, across)

    return draw


def packed(bits: int, group: int, zeros: bool, kind: str = "BF16", order: bool = False) -> Callable[..., Drawn]:
    """compressed-tensors' pack-quantized: codes and zero points above the least of signed ones."""

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Drawn:
        across, half = group or cols, 2 ** (bits - 1)
        q = rng.integers(-half, half, (rows, cols))
        factors, read = floats(draw_scales((rows, cols // across), half / 1.7, cols, rng), kind)
        tensors, zero = {"weight_packed": words(q + half, bits), "weight_scale": factors}, 0 * read
        tensors["weight_shape"] = torch.tensor([rows, cols])
        if zeros:
            zero = rng.integers(-half, half, read.shape)
            tensors["weight_zero_point"] = words((zero + half).T, bits).T.contiguous()
        if order:
            tensors["weight_g_idx"] = torch.tensor([column // across for column in range(cols)], dtype=torch.int32)
        return tensors, (q - spread(zero, q.shape, 1, across)) * spread(read, q.shape, 1, across)

    return draw


def gptq(bits: int, group: int, sym: bool, v1: bool = True, kind: str = "F16") -> Callable[..., Drawn]:
    """Codes along the inputs; zero points, stored one too small by v1, along the outputs."""

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Drawn:
        across, most = group or cols, 2**bits
        q = rng.integers(0, most, (rows, cols))
        zero = rng.integers(1, most, (rows, cols // across))
        zero[:] = most // 2 if sym else zero
        factors, read = floats(draw_scales(zero.shape, most / 3.4, cols, rng), kind)
        tensors = {
            "qweight": words_down(q.T, bits),
            "qzeros": words((zero - v1).T, bits),
            "scales": factors.t().contiguous(),
            "g_idx": torch.tensor([column // across for column in range(cols)], dtype=torch.int32),
        }
        return tensors, (q - spread(zero, q.shape, 1, across)) * spread(read, q.shape, 1, across)

    return draw


def words_down(codes: Array, bits: int) -> torch.Tensor:
    """Codes [R, C] to int32 [R bits / 32, C]: a word holds codes of one column."""
    return words(codes.T, bits).T.contiguous()


def awq(group: int) -> Callable[..., Drawn]:
    """Codes and zero points along the outputs, in an order of their own."""

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Drawn:
        across = group or cols
        q, zero = rng.integers(0, 16, (rows, cols)), rng.integers(0, 16, (rows, cols // across))
        factors, read = floats(draw_scales(zero.shape, 4.6, cols, rng), "F16")
        tensors = {"qweight": awq_words(q.T), "qzeros": awq_words(zero.T), "scales": factors.t().contiguous()}
        return tensors, (q - spread(zero, q.shape, 1, across)) * spread(read, q.shape, 1, across)

    return draw


def awq_words(codes: Array) -> torch.Tensor:
    """Codes [R, C] to int32 [R, C / 8]."""
    out = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for word in range(out.shape[1]):
        for nibble, column in enumerate(AWQ_ORDER):
            out[:, word] |= codes[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(out.view(np.int32))


def nvfp4(modelopt: bool) -> Callable[..., Drawn]:
    """e2m1 codes, an e4m3 scale for each 16 columns, and a float32 that multiplies or, of compressed-tensors,
    divides."""

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Drawn:
        codes = rng.integers(0, 16, (rows, cols))
        scales = np.exp(rng.normal(4, 0.5, (rows, cols // 16))).clip(max=448)  # e4m3's largest
        blocks = torch.from_numpy(scales).to(torch.float8_e4m3fn)
        whole = torch.tensor(float(1 / (60 * 3 * cols**0.5)), dtype=torch.float32)
        factor = float(whole) if modelopt else 1 / float(1 / whole)
        nibbles = torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8))
        values = E2M1[codes] * spread(blocks.double().numpy(), codes.shape, 1, 16) * factor
        if modelopt:
            return {"weight": nibbles, "weight_scale": blocks, "weight_scale_2": whole}, values
        return {"weight_packed": nibbles, "weight_scale": blocks, "weight_global_scale": (1 / whole)[None]}, values

    return draw


def compressed(packing: str, weights: dict[str, Any], activations: Any = None, **more: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group of all linear modules."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    } | more


def scheme(bits: int, kind: str, strategy: str, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """How compressed-tensors tells of weights."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False} | more


DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
STATIC = DYNAMIC | {"strategy": "tensor", "dynamic": False}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SCALAR = torch.tensor(0.5)


def _compressed(packing: str, weights: dict[str, Any], draw: Callable[..., Drawn], activations: Any = None) -> Method:
    return Method(compressed(packing, weights, activations), draw)


METHODS: dict[str, Method] = {
    "fp8-block": Method(BLOCK_FP8, fp8("block", "weight_scale_inv")),
    "fp8-block-bf16-scales": Method(
        BLOCK_FP8 | {"modules_to_not_convert": ["lm_head"]}, fp8("block", "weight_scale_inv", "BF16")
    ),
    "fp8-tensor": Method(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        fp8("tensor"),
        extra={"input_scale": SCALAR},
    ),
    "ct-fp8-channel": _compressed(
        "float-quantized", scheme(8, "float", "channel"), fp8("channel", kind="BF16"), DYNAMIC
    ),
    "ct-fp8-tensor": Method(
        compressed("float-quantized", scheme(8, "float", "tensor"), STATIC, kv_cache_scheme=STATIC),
        fp8("tensor", kind="BF16"),
        extra={"input_scale": SCALAR[None]},
    ),
    "ct-fp8-block": _compressed(
        "float-quantized", scheme(8, "float", "block", block_structure=[128, 128]), fp8("block"), DYNAMIC
    ),
    "ct-int8-channel": _compressed("int-quantized", scheme(8, "int", "channel"), int8(0, False), DYNAMIC),
    "ct-int8-zeros": _compressed("int-quantized", scheme(8, "int", "channel", False), int8(0, True)),
    "ct-int8-groups": _compressed("int-quantized", scheme(8, "int", "group", group_size=64), int8(64, False, "BF16")),
    "ct-int4-128": _compressed("pack-quantized", scheme(4, "int", "group", group_size=128), packed(4, 128, False)),
    "ct-int4-32": _compressed("pack-quantized", scheme(4, "int", "group", group_size=32), packed(4, 32, False, "F16")),
    "ct-int4-zeros": _compressed(
        "pack-quantized", scheme(4, "int", "group", False, group_size=64), packed(4, 64, True)
    ),
    "ct-int4-channel": _compressed(
        "pack-quantized", scheme(4, "int", "channel", actorder="static"), packed(4, 0, False, order=True)
    ),
    "ct-int8-packed": _compressed("pack-quantized", scheme(8, "int", "channel"), packed(8, 0, False)),
    "ct-int8-packed-zeros": _compressed(
        "pack-quantized", scheme(8, "int", "group", False, group_size=128), packed(8, 128, True)
    ),
    "ct-nvfp4": _compressed(
        "nvfp4-pack-quantized", scheme(4, "float", "tensor_group", group_size=16), nvfp4(modelopt=False)
    ),
    "gptq": Method(GPTQ, gptq(4, 128, True)),
    "gptq-zeros": Method(GPTQ | {"group_size": 32, "sym": False}, gptq(4, 32, False)),
    "gptq-v2": Method(GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, gptq(4, 128, False, v1=False)),
    "gptq-row": Method(GPTQ | {"group_size": -1, "desc_act": True}, gptq(4, 0, True)),
    "gptq-8": Method(GPTQ | {"bits": 8}, gptq(8, 128, True)),
    "awq": Method(AWQ | {"modules_to_not_convert": ["lm_head"]}, awq(128)),
    "awq-64": Method(AWQ | {"group_size": 64, "modules_to_not_convert": None}, awq(64)),
    "modelopt-fp8": Method(
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        fp8("tensor"),
        extra={"input_scale": SCALAR},
    ),
    "modelopt-nvfp4": Method(
        {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head*"]}},
        nvfp4(modelopt=True),
        extra={"input_scale": SCALAR},
    ),
}


@dataclass(frozen=True)
class Quantized:
    """A checkpoint on disk, and the transformers model (float32) with the values that its matrices stand for."""

    path: Path
    oracle: PreTrainedModel
    values: dict[str, Array]
    """float64, by the names of parameters."""


def make_quantized(case: Case, method: Method, folder: Path, seed: int) -> Quantized:
    """What is not quantised is bf16. Experts have a tensor for each part of each."""
    made, rng = make_safetensors(case, "BF16", folder), np.random.default_rng(seed)
    tensors, values, pattern = load_file(folder / "model.safetensors"), {}, re.compile(rf"({method.modules})\.weight")
    for name in sorted(filter(pattern.fullmatch, tensors)):
        drawn, values[name] = method.draw(*tensors.pop(name).shape, rng)
        _put(made.oracle, name, torch.from_numpy(values[name]))
        base = name.removesuffix("weight")
        tensors |= {base + suffix: tensor.clone() for suffix, tensor in (drawn | method.extra).items()}
    assert values
    save_file(tensors, folder / "model.safetensors")
    write_config(folder, quantization_config=method.config)
    return Quantized(folder, made.oracle, values)


def _put(oracle: PreTrainedModel, name: str, values: torch.Tensor) -> None:
    """Into the parameter that holds them: experts lie in one, gate rows over up rows."""
    parameters = dict(oracle.named_parameters())
    expert = re.fullmatch(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight", name)
    with torch.no_grad():
        if expert is None:
            parameters[name].copy_(values)
            return
        base, number, part = expert.groups()
        stacked = parameters[base + ("down_proj" if part == "down" else "gate_up_proj")][int(number)]
        first = len(values) if part == "up" else 0
        stacked[first : first + len(values)].copy_(values)


MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def make_mxfp4(case: Case, folder: Path, seed: int) -> Quantized:
    """gpt-oss: e2m1 codes [experts, rows, blocks, 16] and exponents [experts, rows, blocks] of a layer's experts."""
    made, rng = make_safetensors(case, "BF16", folder), np.random.default_rng(seed)
    tensors, values, parameters = load_file(folder / "model.safetensors"), {}, dict(made.oracle.named_parameters())
    for name in [name for name in tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        codes = rng.integers(0, 16, (experts, rows, cols))
        exponents = rng.integers(120, 127, (experts, rows, cols // 32))
        values[name] = E2M1[codes] * np.repeat(2.0 ** (exponents - 128), 32, axis=2)
        packed_codes = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
        tensors[name + "_blocks"] = torch.from_numpy(packed_codes.reshape(experts, rows, cols // 32, 16))
        tensors[name + "_scales"] = torch.from_numpy((exponents - 1).astype(np.uint8))
        with torch.no_grad():
            parameters[name].copy_(torch.from_numpy(values[name]).transpose(1, 2))
    save_file(tensors, folder / "model.safetensors")
    write_config(folder, quantization_config=MXFP4)
    return Quantized(folder, made.oracle, values)


def write_config(folder: Path, **changes: Any) -> None:
    """Change settings of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
