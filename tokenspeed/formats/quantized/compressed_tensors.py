"""Checkpoints of compressed-tensors: groups of modules, each with a scheme and a packing of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.contracts.errors import FormatError
from tokenspeed.formats.quantized import fp8, nvfp4
from tokenspeed.formats.quantized.layout import (
    FLOATS,
    Grid,
    Layout,
    Quantization,
    Rule,
    groups_of,
    names,
    only,
    refuse,
    whole,
    words_of,
)

METHOD = "compressed-tensors"
PLAIN_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
"""One value in an element of the tensor."""
FORMATS = (*PLAIN_FORMATS, "pack-quantized", "nvfp4-pack-quantized")
DENSE = "dense"
KV_NOTE = "the KV cache has the type of --kv-cache-dtype, whatever the checkpoint was made for"
ACTIVATIONS_NOTE = "activations of int8 matrices keep their type, which is more exact than the config asks for"


@dataclass(frozen=True)
class Int8Layout(Layout):
    """`weight` int8 [N, K], `weight_scale` for the whole (group -1), for each row (0) or each group of columns, and
    where it has zeros `weight_zero_point` int8 of the scales' shape: values are (code - zero) times scale."""

    group: int
    zeros: bool

    @property
    def fmt(self) -> str:
        return "I8"

    @property
    def grid(self) -> Grid:
        return Grid("int8", int(self.group >= 0), max(0, self.group), self.zeros)

    @property
    def marker(self) -> str:
        return "weight_scale"

    def rules(self, rows: int, cols: int) -> dict[str, Rule]:
        shapes = _scale_shapes(rows, cols, self.group)
        zeros = {"weight_zero_point": Rule(shapes, ("I8",), needed=self.zeros)}
        return {"weight": Rule(((rows, cols),), ("I8",)), "weight_scale": Rule(shapes, FLOATS)} | zeros


@dataclass(frozen=True)
class PackedLayout(Layout):
    """`weight_packed` int32 [N, ceil(K bits / 32)], codes above their least value, lowest bits first; `weight_scale`;
    where it has zeros `weight_zero_point` int32, packed in the same way along the rows; `weight_g_idx`, the group of
    each column, must rise in order. group: as Int8Layout."""

    bits: int
    group: int
    zeros: bool

    @property
    def fmt(self) -> str:
        return f"I32_PACKED_{self.bits}"

    @property
    def grid(self) -> Grid:
        return Grid("int4" if self.bits == 4 else "int8", int(self.group >= 0), max(0, self.group), self.zeros)

    @property
    def marker(self) -> str:
        return "weight_packed"

    def rules(self, rows: int, cols: int) -> dict[str, Rule]:
        shapes = _scale_shapes(rows, cols, self.group)
        packed = tuple((words_of(rows, self.bits), shape[1]) for shape in shapes if len(shape) == 2)
        rules = {
            "weight_packed": Rule(((rows, words_of(cols, self.bits)),), ("I32",)),
            "weight_scale": Rule(shapes, ("BF16", "F16", "F32")),
            "weight_shape": Rule(((2,),), ("I64", "I32"), needed=False, axis=1),
            "weight_g_idx": Rule(((cols,),), ("I32",), needed=False, axis=1),
        }
        if self.zeros:
            rules["weight_zero_point"] = Rule(packed, ("I32",), per=32 // self.bits)
        return rules


def _scale_shapes(rows: int, cols: int, group: int) -> tuple[tuple[int, ...], ...]:
    if group < 0:
        return ((1,), (), (1, 1))
    groups = groups_of(cols, group, METHOD)
    return ((rows, groups), (rows,)) if groups == 1 else ((rows, groups),)


@dataclass(frozen=True)
class _Group:
    targets: tuple[str, ...]
    layout: Layout


def read_compressed_tensors(config: Mapping[str, Any]) -> Quantization:
    """From a quantization_config of quant_method "compressed-tensors". Raises UnsupportedError naming what is not
    read."""
    only(config, METHOD, "quantization_status", None, "compressed", "frozen")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", DENSE) != DENSE:
        raise refuse(METHOD, "sparsity_config", sparsity["format"], DENSE)
    if (config.get("transform_config") or {}).get("config_groups"):
        raise refuse(METHOD, "transform_config", "config_groups", "none")
    given = config.get("config_groups")
    if not isinstance(given, dict) or not given:
        raise FormatError(f"quantization_config {METHOD!r}: config_groups is missing or empty")
    groups = [_group(config, name, group) for name, group in given.items()]
    ignored = names(config, METHOD, "ignore")
    notes = [KV_NOTE] if config.get("kv_cache_scheme") else []
    asked = [group.get("input_activations") or {} for group in given.values()]
    if any(each.get("dynamic") is False for each in asked):
        notes.append(fp8.STATIC)
    if any(each and isinstance(group.layout, Int8Layout) for each, group in zip(asked, groups, strict=True)):
        notes.append(ACTIVATIONS_NOTE)

    def layout_of(module: str) -> Layout | None:
        if any(_matches(module, pattern) for pattern in ignored):
            return None
        # A pattern that names the module goes before one that names its class.
        ranked = sorted(groups, key=lambda group: group.targets == ("Linear",))
        return next((group.layout for group in ranked if _is_target(module, group.targets)), None)

    unread = ("*.input_scale", "*.input_zero_point", "*.input_global_scale")
    all_fp8 = all(isinstance(group.layout, fp8.Fp8Layout) for group in groups)
    return Quantization(METHOD, layout_of, f"{METHOD} {groups} {ignored}", all_fp8, unread, tuple(notes))


def _is_target(module: str, targets: tuple[str, ...]) -> bool:
    return any(target == "Linear" or _matches(module, target) for target in targets)


def _matches(module: str, pattern: str) -> bool:
    """By a regular expression behind "re:", which begins where the name does, or by the name."""
    if not pattern.startswith("re:"):
        return module == pattern
    try:
        return re.match(pattern.removeprefix("re:"), module) is not None
    except re.error as error:
        raise FormatError(f"quantization_config {METHOD!r}: pattern {pattern!r}: {error}") from None


def _group(config: Mapping[str, Any], name: str, group: Any) -> _Group:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise FormatError(f"quantization_config {METHOD!r}: {name} has no weights")
    packing = group.get("format") or config.get("format")
    if packing not in FORMATS:
        raise refuse(METHOD, "format", packing, ", ".join(FORMATS))
    if group.get("output_activations"):
        raise refuse(METHOD, f"{name}: output_activations", "...", "none")
    targets = names(group, METHOD, "targets")
    return _Group(targets, _layout(packing, group["weights"]))


def _layout(packing: str, weights: Mapping[str, Any]) -> Layout:
    bits, kind = weights.get("num_bits"), weights.get("type")
    strategy = weights.get("strategy")
    if packing == "nvfp4-pack-quantized":
        if (kind, bits, whole(weights, METHOD, "group_size", nvfp4.BLOCK)) != ("float", 4, nvfp4.BLOCK):
            raise refuse(METHOD, packing, dict(weights), "float, 4 bits, group_size 16")
        return nvfp4.COMPRESSED_TENSORS
    if kind == "float":
        return _fp8(packing, bits, strategy, weights)
    only(weights, METHOD, "type", "int")
    only(weights, METHOD, "actorder", None, False, "static", "weight", "group", "dynamic")
    group = {"tensor": -1, "channel": 0, "group": whole(weights, METHOD, "group_size", 0)}.get(str(strategy))
    if group is None or (strategy == "group" and group < 1):
        raise refuse(METHOD, "strategy", strategy, "tensor, channel, group with a group_size")
    zeros = weights.get("symmetric") is False
    if packing == "pack-quantized":
        only(weights, METHOD, "num_bits", 4, 8)
        if zeros and group < 0:
            raise refuse(METHOD, "symmetric", False, "True, with strategy 'tensor'")
        return PackedLayout(int(weights["num_bits"]), group, zeros)
    only(weights, METHOD, "num_bits", 8)
    return Int8Layout(group, zeros)


def _fp8(packing: str, bits: object, strategy: object, weights: Mapping[str, Any]) -> Layout:
    if packing not in PLAIN_FORMATS or bits != 8:
        raise refuse(METHOD, packing, f"float, {bits} bits", "float, 8 bits in float-quantized")
    if strategy == "block" and list(weights.get("block_structure") or ()) != [fp8.BLOCK, fp8.BLOCK]:
        raise refuse(METHOD, "block_structure", weights.get("block_structure"), f"[{fp8.BLOCK}, {fp8.BLOCK}]")
    if strategy == "tensor" or strategy == "channel" or strategy == "block":
        return fp8.Fp8Layout(strategy)
    raise refuse(METHOD, "strategy", strategy, "tensor, channel, block")
