"""GGUF files by hand, so that every field can be wrong; and small valid ones."""

import struct
from collections.abc import Sequence

import numpy as np

MAGIC = b"GGUF"


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


def strings(key: str, values: list[str | bytes]) -> bytes:
    return pair(key, 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(string, values)))


def tensor(name: str, dims: tuple[int, ...], type_id: int, offset: int) -> bytes:
    """`dims` in GGUF order: columns first."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def build(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    align: int = 32,
    tensor_count: int | None = None,
    pair_count: int | None = None,
) -> bytes:
    tensor_count = len(tensors) if tensor_count is None else tensor_count
    pair_count = len(pairs) if pair_count is None else pair_count
    head = MAGIC + struct.pack("<IQQ", version, tensor_count, pair_count)
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % align) + data


def small(rng: np.random.Generator) -> bytes:
    """Two tensors and one of each kind of metadata."""
    pairs = [
        pair("general.architecture", 8, string("llama")),
        u32("n", 7),
        pair("flag", 7, b"\x01"),
        strings("words", ["a", "bc", "", "ü", "x" * 300, "end"]),
        pair("scores", 9, struct.pack("<IQ3f", 6, 3, 1.5, -2.0, 0.25)),
    ]
    tensors = [tensor("a", (32, 3), 8, 0), tensor("b", (5,), 0, 128)]
    return build(pairs, tensors, rng.bytes(128 + 20))
