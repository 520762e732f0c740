"""How a checkpoint keeps a quantised matrix: which tensors it takes, and what each must look like. No torch.

A matrix is [rows, columns] as a linear layer has it: outputs, inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from tokenspeed.contracts.errors import FormatError, UnsupportedError

FLOATS = ("F32", "BF16", "F16")
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
WEIGHT = ".weight"


@dataclass(frozen=True)
class Rule:
    """What one tensor of a matrix may be: its shapes, the usual one first, and its types. needed: whether it must be
    there. axis, per: the axis along which rows lie, and how many rows an element of it stands for; a tensor of another
    size there is for all rows."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    needed: bool = True
    axis: int = 0
    per: int = 1

    @property
    def nbytes(self) -> int:
        """Of the first shape and type."""
        return prod(self.shapes[0]) * ITEM_BYTES[self.dtypes[0]]


@dataclass(frozen=True)
class Grid:
    """What a layout's codes are, and of what they have scales: codes e4m3, int8 or int4; down, across: rows and columns
    that share a scale, 0 for all; zeros: whether there may be zero points."""

    codes: Literal["fp8", "int8", "int4"]
    down: int
    across: int
    zeros: bool = False


class Layout(ABC):
    """Of the matrices of one module."""

    @property
    def grid(self) -> Grid | None:
        """Of what its codes are; None where values are no codes with scales as a Grid has them."""
        return None

    @property
    @abstractmethod
    def fmt(self) -> str:
        """A short name of what is stored."""

    @property
    @abstractmethod
    def marker(self) -> str:
        """The suffix of a tensor that only a quantised module has."""

    @abstractmethod
    def rules(self, rows: int, cols: int) -> dict[str, Rule]:
        """The tensors of a matrix, by suffix. Raises UnsupportedError where the layout has no such matrix."""

    def tensor(self, source: str, suffix: str) -> str:
        """The name of a tensor of the matrix that is called `source` where it is not quantised."""
        return f"{module_of(source)}.{suffix}"

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix with the usual types."""
        return sum(rule.nbytes for rule in self.rules(rows, cols).values() if rule.needed)


@dataclass(frozen=True)
class Quantization:
    """What a config.json says of a checkpoint's matrices. layout_of: of a module by its name, None where it is not
    quantised. fp8: whether all layouts are of e4m3. unread: patterns (fnmatch) of tensors that the values of matrices
    do not depend on. notes: what is done differently from what the config says."""

    method: str
    layout_of: Callable[[str], Layout | None]
    description: str
    fp8: bool = False
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def module_of(source: str) -> str:
    """The module of a matrix."""
    return source.removesuffix(WEIGHT)


def refuse(method: str, key: str, value: object, supported: str) -> UnsupportedError:
    """The error for a setting that is not supported."""
    return UnsupportedError(
        f"quantization_config {method!r}: {key} {value!r} is not supported (supported: {supported})"
    )


def only(config: Mapping[str, Any], method: str, key: str, *allowed: object) -> None:
    """Raise UnsupportedError where a setting, None where it is left out, is not among those allowed."""
    if config.get(key) not in allowed:
        raise refuse(method, key, config.get(key), ", ".join(map(repr, allowed)))


def whole(config: Mapping[str, Any], method: str, key: str, default: int) -> int:
    """An integer setting. Raises FormatError for anything else."""
    value = config.get(key, default)
    if type(value) is not int:
        raise FormatError(f"quantization_config {method!r}: {key} must be an integer, got {value!r}")
    return value


def names(config: Mapping[str, Any], method: str, key: str) -> tuple[str, ...]:
    """A list of names, empty where it is left out. Raises FormatError for anything else."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise FormatError(f"quantization_config {method!r}: {key} must be a list of names")
    return tuple(value)


def groups_of(cols: int, group: int, method: str) -> int:
    """How many groups a row has; group 0 or less: one. Raises UnsupportedError where columns are no whole groups."""
    if group <= 0:
        return 1
    if cols % group:
        raise UnsupportedError(f"quantization_config {method!r}: groups of {group} do not divide {cols} columns")
    return cols // group


def words_of(count: int, bits: int) -> int:
    """32-bit words of so many codes."""
    return -(-count * bits // 32)
