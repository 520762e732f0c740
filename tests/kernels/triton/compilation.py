"""Compiles launches without a device: `with recorded(target) as kernels:` turns every launch into a compilation.

Run in a process whose environment lacks TRITON_INTERPRET. Tensors may be on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "enable_fp_fusion")
INSTRUCTIONS = (
    "wgmma.mma_async",
    "mma.sync",
    "tcgen05.mma",
    "griddepcontrol.wait",
    "griddepcontrol.launch_dependents",
    "prefetch.global.L2",
    "ldmatrix",
)


@contextmanager
def recorded(target: str) -> Iterator[list[dict[str, Any]]]:
    """Inside, launches compile for the target; the list gets a summary of each."""
    kernels: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(_compile(self, args, kwargs, TARGETS[target]))

    JITFunction.run = compile_instead
    try:
        yield kernels
    finally:
        JITFunction.run = run


def _compile(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: GPUTarget) -> dict[str, Any]:
    given = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in OPTIONS}
    options = {k: v for k, v in kwargs.items() if k in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for position, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = given[name]
        if value is None or parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    counts = {text: len(re.findall(re.escape(text), assembly)) for text in INSTRUCTIONS}
    loads = re.findall(r"ld\.global[.\w:]*", assembly.split("griddepcontrol.wait")[0])
    first = sum("evict_first" in load for load in loads)
    before = {"evict_first loads before wait": first, "other loads before wait": len(loads) - first}
    before["starts the next before wait"] = "griddepcontrol.launch" in assembly.split("griddepcontrol.wait")[0]
    return {
        "name": kernel.__name__,
        "x": signature[kernel.arg_names[0]],
        "shared": compiled.metadata.shared,
        **before,
        **counts,
        **_words(compiled.asm.get("ttgir", "")),
    }


def _words(ttgir: str) -> dict[str, int]:
    """How much assembly takes int16 words of which a register has neighbouring columns, and how much takes others."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    taken = re.findall(r"elementwise_inline_asm.* : tensor<\d+x\d+xi16, (#ttg\.\w+<{.*?}>|#\w+)", ttgir)
    side = [re.search(r"dot_op<.*kWidth = 2}|register = \[\[0, 1\]", layouts.get(each, each)) for each in taken]
    return {"words side by side": sum(map(bool, side)), "words apart": side.count(None)}


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"
