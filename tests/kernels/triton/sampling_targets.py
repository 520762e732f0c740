"""Compiles the sampling kernels for given targets, without a GPU: `python FILE [--dtype bf16] sm_90 gfx942 ...`.

Prints one line of JSON per kernel. Run as a child process: what was imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokenspeed.kernels.triton import edits, logprobs, mailbox, sample, step

FLOATS = {"peaks_in", "peaks_out", "edited", "candidate_values", "sums", "logprobs", "top_logprobs"}
SIZES = {"stride", "num_slots", "vocab", "num_peaks", "mask_words", "pool_stride", "parts", "top"}
STEP_SIZES = {"header_size", "head_size", "state_size", "results_stride", "bucket", "max_rows", "pool_length", "rows"}


def cases(pdl: bool) -> list[tuple[Any, dict[str, Any]]]:
    """Kernels with the compile-time arguments of a step of 1 to 4 rows and 128256 tokens."""
    edit = {"COUNTS": True, "MASK": True, "PDL": pdl}
    choose = {"P": 2048, "CANDIDATES": 1024, "CHUNK": 64, "BLOCK": 4096, "PDL": pdl}
    return [
        (sample._peaks, {"P": 2048, "PEAKS": 16, "PDL": pdl}),
        (sample._choose, choose),
        (edits._edit_all, {"TILE": 4096, **edit}),
        (edits._edit_listed, {"POOL": True, **edit}),
        (logprobs._summaries, {"P": 2048, "PEAKS": 64, "PDL": pdl}),
        (logprobs._logprobs, {"P": 2048, "PEAKS": 64, "TOP": 32, "PDL": pdl}),
        (mailbox._fetch, {"SLOTS": 4, "WORDS": 512, "BLOCK": 1024, "PDL": pdl}),
        (step._expand, {"ROWS": 128, "BLOCK": 64, "PDL": pdl}),
        (step._finish, {"SLOTS": 4, "ROWS": 128, "COUNTS": True, "PDL": pdl}),
        (step._count, {"BLOCK": 1024}),
    ]


def compiled(kernel: Any, constants: dict[str, Any], target: GPUTarget, dtype: str) -> dict[str, Any]:
    """The kernel's assembly by kind."""
    assert "params" not in kernel.arg_names  # Triton's launcher overwrites an argument of that name.
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in SIZES | STEP_SIZES:
            signature[name] = "i32"
        elif name == "results":
            signature[name] = "*i64"
        else:
            signature[name] = "*fp32" if name in FLOATS else f"*{dtype}" if name == "logits" else "*i32"
    source = ASTSource(kernel, signature, constants)
    return dict(triton.compile(source, target=target, options={"enable_fp_fusion": False, "num_warps": 8}).asm)


def target_of(name: str) -> GPUTarget:
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--dtype", default="fp32")
    options = parser.parse_args()
    for name in options.targets:
        target = target_of(name)
        pdl = target.backend == "cuda" and int(name[3:]) >= 90
        for kernel, constants in cases(pdl):
            asm = compiled(kernel, constants, target, options.dtype)
            text = asm.get("ptx", "")
            before = text.split("griddepcontrol.wait")[0]
            found = {
                "binary": "cubin" in asm or "hsaco" in asm,
                "pdl": pdl and "PDL" in constants,
                "waits": "griddepcontrol.wait" in text and "griddepcontrol.launch_dependents" in text,
                "loads before wait": len(re.findall(r"ld\.global", before)),
                "fused": "fma.rn.f32" in text,
            }
            print(json.dumps({"kernel": kernel.__name__, "target": name, **found}), flush=True)


if __name__ == "__main__":
    main()
