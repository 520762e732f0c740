"""What the C++ walk takes: these ops, in the weight formats it has kernels for. It needs the built extension."""

from __future__ import annotations

import os

from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.ops.definitions import Operands

FORMATS = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
)
"""In the order of the C++ enum."""
PLANES = len(FORMATS)
"""After them: Q8_0 in two planes, for a screened head."""
PLAIN = ("embed", "norm", "linear", "split", "attention", "add", "act_mul", "select", "softcap", "route", "experts")
FUSED = (
    "rope_write",
    "qk_norm_rope_write",
    "linear_act",
    "norm_linear",
    "norm_linear_act",
    "join_norm_linear",
    "join_norm_linear_act",
    "branch_join_norm_linear",
    "branch_join_norm_linear_act",
)
ISA_VARIABLE = "TOKENSPEED_CPU_ISA"
"""Environment variable that forces a lower tier: avx512, avx2, neon or generic."""


def extension_available() -> bool:
    """Whether the C++ extension was built."""
    try:
        from tokenspeed.kernels.cpu import _walk  # noqa: F401
    except ImportError:
        return False
    return True


def forced_isa() -> str:
    """The instruction set that the environment asks for; empty for the best."""
    return os.environ.get(ISA_VARIABLE, "")


def register(registry: Registry) -> None:
    """Add the walk's ops. `run` is not called: the walk runs the whole plan in one call."""
    for op in PLAIN + FUSED:
        registry.add(Implementation("walk", op, "cpu", _whole_plan_only, _takes, priority=10))


def _whole_plan_only(*args: object) -> None:
    raise RuntimeError("records of the C++ walk are not run one by one")


def _takes(operands: Operands, situation: Situation) -> bool:
    return situation.device == "cpu" and all(
        fmt in FORMATS for name in operands.weights for fmt in situation.formats.get(name, ())
    )
