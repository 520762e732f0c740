"""Types of the C++ extension; see src/bind.cpp and src/bind_attention.cpp."""

from typing import Any

import numpy as np
import numpy.typing as npt

LAYOUT_VERSION: int
"""Of packed segments; raised with every change of theirs."""

class Kind:
    Embed: Kind
    Linear: Kind
    Norm: Kind
    Add: Kind
    ActMul: Kind
    RopeWrite: Kind
    Attention: Kind
    Select: Kind

class Op:
    def __init__(self, kind: Kind) -> None: ...
    def __setattr__(self, name: str, value: float) -> None: ...
    def __getattr__(self, name: str) -> Any: ...

class Ask:
    def __init__(
        self,
        temperature: float,
        seed: int,
        sample: int,
        position: int,
        top_k: int,
        top_p: float,
        log_min_p: float,
    ) -> None: ...

class Model:
    def __init__(self, threads: int, isa: str = "") -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def packed_bytes(self) -> int: ...
    def add_matrix(self, cols: int) -> int: ...
    def reserve_segment(self, matrix: int, format: int, rows: int) -> int: ...
    def pack_rows(self, matrix: int, segment: int, first: int, source: Any) -> None: ...
    def add_segment(self, matrix: int, format: int, source: Any) -> None: ...
    def packed(self, matrix: int, segment: int) -> npt.NDArray[np.uint8]: ...
    def add_vector(self, values: Any) -> int: ...
    def add_rope(self, frequency: Any, scale: float) -> int: ...
    def add_value(self, buffer: int, offset: int, width: int, stride: int) -> int: ...
    def add_op(self, op: Op) -> None: ...
    def set_cache(
        self,
        data: int,
        strides: list[int],
        page_size: int,
        format: int,
        group: list[int],
        index: list[int],
    ) -> None: ...
    def body(self, tokens: Any, positions: Any, starts: Any, tables: Any, table_starts: Any, groups: int) -> None: ...
    def head(self, rows: Any, logits: Any) -> None: ...
    def hidden(self, rows: Any, out: Any) -> None: ...
    def pick(
        self,
        rows: Any,
        asks: list[Ask],
    ) -> list[list[tuple[int, float]]]: ...
    def decode(
        self,
        most: int,
        ends: list[int],
        asks: list[Ask],
        tokens: Any,
        positions: Any,
        starts: Any,
        tables: Any,
        table_starts: Any,
        groups: int,
    ) -> list[list[list[tuple[int, float]]]]: ...
    def draw(
        self,
        matrix: int,
        x: Any,
        asks: list[Ask],
    ) -> list[list[tuple[int, float]]]: ...
    def gumbel(self, seed: int, sample: int, position: int, first: int) -> list[float]: ...
    def mass(self, logits: Any, temperature: float, best: float, above: float) -> float: ...
    @property
    def looked(self) -> int: ...
    @property
    def whole(self) -> int: ...
    @property
    def rescored(self) -> int: ...
    def multiply(self, matrix: int, x: Any, out: Any) -> None: ...
    def unpack_row(self, matrix: int, row: int, out: Any) -> None: ...

def store_kv(isa: str, format: int, x: Any, out: Any) -> None: ...
def attend(
    isa: str,
    format: int,
    q: Any,
    pages: Any,
    table: Any,
    first_position: int,
    window: int,
    scale: float,
    out: Any,
) -> None: ...
