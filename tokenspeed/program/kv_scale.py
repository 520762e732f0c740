"""The pass that gives layers the scales of their fp8 pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tokenspeed.ops.definitions import KvScale
from tokenspeed.program.program import Program, Record

_OPS = ("kv_write", "attention")


def with_kv_scales(program: Program, scales: Mapping[int, KvScale]) -> Program:
    """The same program, not fused yet, whose layers store keys and values over these scales; others stay as they
    are."""

    def scaled(record: Record) -> Record:
        if record.op not in _OPS or record.attrs["layer"] not in scales:
            return record
        return replace(record, attrs={**record.attrs, "kv_scale": scales[record.attrs["layer"]]})

    return program.replace(tuple(map(scaled, program.records)))
