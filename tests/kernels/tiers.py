"""The instruction sets that this processor runs, best first."""

from __future__ import annotations

from tokenspeed.kernels.cpu import _walk

TIERS = ("avx512", "avx2", "neon", "generic")


def runs(isa: str) -> bool:
    try:
        _walk.Model(1, isa)
    except ValueError:
        return False
    return True


TIERS_HERE = [isa for isa in TIERS if runs(isa)]
