"""Compiles the attention kernels as their launchers launch them on real shapes, without a GPU; run as a child process.

python compile_attention.py [KIND:ARCH[:WARP] ...] prints one JSON object: per kernel and target its shared memory and
what instructions it has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokenspeed.kernels.triton import decode_attention, invariant_attention, prefill_attention, rope_write, work_items
from tokenspeed.kernels.triton.attention_tiles import decode_tile, prefill_tile
from tokenspeed.kernels.triton.paged import Heads, PagedLayer
from tokenspeed.ops.rope import Rope

BF16, F32, F8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
TYPES = {BF16: "*bf16", torch.float16: "*fp16", F32: "*fp32", torch.int32: "*i32", F8: "*fp8e4nv"}
LLAMA = Heads(32, 8, 128, 0.088, 0)
SMALL = Heads(32, 8, 64, 0.125, 0)
GEMMA = Heads(4, 1, 256, 0.0625, 512)
GEMMA2 = Heads(8, 4, 256, 0.0625, 4096, 50.0)
WORDS = (
    "wgmma", "mma.sync", "tcgen05", "mfma", "cp.async", "griddepcontrol.wait", "griddepcontrol.launch", "cos.approx",
)  # fmt: skip
Launch = tuple[dict[str, Any], dict[str, Any]]


class Recorder:
    """In place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Launch] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            bound = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
            self.launches.append((bound, {k: v for k, v in kwargs.items() if k not in names}))

        return launch


def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def paged(tokens: int, heads: Heads, kv_dtype: torch.dtype) -> PagedLayer:
    kv = empty(99, 16, 2, 64, heads.kv_heads, heads.head_dim, dtype=kv_dtype)
    at = empty(tokens, dtype=torch.int32)
    return PagedLayer(kv[:, 3], empty(300, 2048, dtype=torch.int32), at, at)


def query(tokens: int, heads: Heads, dtype: torch.dtype) -> torch.Tensor:
    return empty(tokens, heads.heads * heads.head_dim, dtype=dtype)


def decode(hip: bool, heads: Heads, tokens: int, dtype: torch.dtype, kv_dtype: torch.dtype, pdl: bool) -> None:
    tile = decode_tile(tokens, heads.kv_heads, heads.head_dim, max(dtype.itemsize, kv_dtype.itemsize), hip)
    q, layer = query(tokens, heads, dtype), paged(tokens, heads, kv_dtype)
    decode_attention.decode_attention(q, layer, heads, tile, early=pdl, pdl=pdl)


def prefill(hip: bool, heads: Heads, dtype: torch.dtype, kv_dtype: torch.dtype, sinks: bool = False) -> None:
    tile = prefill_tile(heads.head_dim, dtype.itemsize, hip)
    items = empty(64, 4, dtype=torch.int32)
    sink = empty(heads.heads, dtype=F32) if sinks else None
    q = query(1024, heads, dtype)
    prefill_attention.prefill_attention(q, paged(1024, heads, kv_dtype), items, heads, tile, sink)


def invariant(hip: bool, heads: Heads, tokens: int, dtype: torch.dtype, kv_dtype: torch.dtype, pdl: bool) -> None:
    tile = invariant_attention.invariant_tile(heads.head_dim, dtype.itemsize, hip)
    invariant_attention.dependent_launch = lambda device: pdl  # type: ignore[attr-defined]
    work, programs = empty(64, 4, dtype=torch.int32), 4 if tokens <= 64 else 0
    q, layer, sinks = query(tokens, heads, dtype), paged(tokens, heads, kv_dtype), empty(heads.heads, dtype=F32)
    invariant_attention.invariant_attention(q, layer, work, heads, sinks if tokens == 2 else None, programs, tile)


def write(hip: bool, heads: Heads, kv_dtype: torch.dtype, normed: bool, pdl: bool) -> None:
    size = heads.head_dim * heads.kv_heads
    q, k, v = empty(8, (heads.group + 2) * size, dtype=BF16).split([heads.group * size, size, size], dim=-1)
    norm = rope_write.HeadNorm(empty(heads.head_dim, dtype=F32), 1e-6)
    rope_write.rope_write(
        q, k, v, paged(8, heads, kv_dtype), Rope(5e5, heads.head_dim), (norm, norm) if normed else None, pdl
    )


def items(hip: bool) -> None:
    row = empty(128, dtype=torch.int32)
    rows = work_items.StepRows(row, row, row, row, row[:1])
    work_items.make_items(rows, 1024, 32, empty(288, 4, dtype=torch.int32), row)


CASES: dict[str, tuple[Any, ...]] = {
    "decode 8b": (decode, LLAMA, 1, BF16, BF16, False),
    "prefill 8b": (prefill, LLAMA, BF16, BF16),
    "write 8b": (write, LLAMA, BF16, False, False),
    "write 8b pdl": (write, LLAMA, BF16, False, True),
    "items": (items,),
    "decode 8b pdl": (decode, LLAMA, 1, BF16, BF16, True),
    "write qk norm pdl": (write, LLAMA, BF16, True, True),
    "decode 1b": (decode, SMALL, 64, BF16, BF16, False),
    "decode gemma": (decode, GEMMA, 8, BF16, BF16, False),
    "decode float32": (decode, GEMMA, 8, F32, F32, False),
    "decode fp8 pages": (decode, LLAMA, 32, BF16, F8, False),
    "decode window 1": (decode, LLAMA._replace(window=1), 1, BF16, BF16, False),
    "prefill 1b sinks": (prefill, SMALL, BF16, BF16, True),
    "prefill gemma": (prefill, GEMMA, BF16, BF16),
    "decode gemma 2": (decode, GEMMA2, 8, BF16, BF16, False),
    "prefill gemma 2": (prefill, GEMMA2, BF16, BF16),
    "prefill float32": (prefill, GEMMA, F32, F32),
    "prefill fp8 pages": (prefill, LLAMA, BF16, F8),
    "invariant 8b pdl": (invariant, LLAMA, 1, BF16, BF16, True),
    "invariant 8b": (invariant, LLAMA, 1024, BF16, BF16, False),
    "invariant 1b sinks": (invariant, SMALL, 2, BF16, BF16, False),
    "invariant 1b prefill": (invariant, SMALL, 512, BF16, BF16, False),
    "invariant gemma": (invariant, GEMMA, 8, BF16, BF16, False),
    "invariant gemma prefill": (invariant, GEMMA, 512, BF16, BF16, False),
    "invariant float32": (invariant, GEMMA, 512, F32, F32, False),
    "invariant fp8 pages": (invariant, LLAMA, 32, BF16, F8, False),
    "write fp8 pages": (write, LLAMA, F8, False, False),
}
NO_PDL = ("cuda:80", "hip:gfx942", "hip:gfx950")
NO_E4M3 = ("cuda:80", "hip:gfx942")
KERNELS = (
    (decode_attention, "_decode"),
    (decode_attention, "_combine"),
    (prefill_attention, "_prefill"),
    (invariant_attention, "_attend"),
    (invariant_attention, "_merge_spans"),
    (rope_write, "_rope_write"),
    (work_items, "_make_items"),
)


def launches(case: str, hip: bool) -> Iterator[tuple[Any, Launch]]:
    recorders = [Recorder(getattr(module, name)) for module, name in KERNELS]
    originals = [recorder.kernel for recorder in recorders]
    for (module, name), recorder in zip(KERNELS, recorders, strict=True):
        setattr(module, name, recorder)
    run, *arguments = CASES[case]
    run(hip, *arguments)
    for (module, name), original in zip(KERNELS, originals, strict=True):
        setattr(module, name, original)
    for recorder in recorders:
        for launch in recorder.launches:
            yield recorder.kernel, launch


def compiled(kernel: Any, launch: Launch, target: GPUTarget) -> Any:
    bound, options = launch
    signature, constants, attrs = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        fixed = not parameter.do_not_specialize and isinstance(value, int) and value == 1
        if parameter.is_constexpr or fixed:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attrs[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attrs), target=target, options=options)


def facts(binary: Any) -> dict[str, Any]:
    text = binary.asm["ptx"] if "ptx" in binary.asm else binary.asm["amdgcn"]
    return {"shared": binary.metadata.shared, "has": [word for word in WORDS if word in text]}


def main(targets: list[str], cases: list[str]) -> None:
    found: dict[str, Any] = {}
    for name in targets:
        kind, arch = name.split(":")
        target = GPUTarget(kind, int(arch) if kind == "cuda" else arch, 32 if kind == "cuda" else 64)
        for case in cases:
            if ("pdl" in case and name in NO_PDL) or ("fp8" in case and name in NO_E4M3):
                continue
            for kernel, launch in launches(case, kind == "hip"):
                found[f"{name} {case} {kernel.fn.__name__}"] = facts(compiled(kernel, launch, target))
    print(json.dumps({"triton": triton.__version__, "kernels": found}))


if __name__ == "__main__":
    split = sys.argv.index("--")
    main(sys.argv[1:split], sys.argv[split + 1 :] or list(CASES))
