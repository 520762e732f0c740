"""Packing in parts: the bytes of packing at once, on every instruction set, and the file's pages go on the way."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.formats.test_map_pages import resident
from tests.kernels.blocks import random_rows
from tests.seeds import SEED
from tokenspeed.formats.safetensors import open_safetensors
from tokenspeed.kernels.cpu import _walk
from tokenspeed.kernels.cpu.registration import FORMATS
from tokenspeed.runner import packing
from tokenspeed.weights.loader import load_weights
from tokenspeed.weights.packed import PackedTensor, Weight, unpermute_rope
from tokenspeed.weights.spec import Source, WeightSpec, WeightTable

TIERS = ("avx512", "avx2", "neon", "generic")


def linear(name: str, cols: int, *sources: Source) -> WeightSpec:
    return WeightSpec(name, (sum(s.rows for s in sources), cols), "linear", sources, sources)


def weight_of(fmt: str, rows: int, cols: int, rng: np.random.Generator, heads: int = 0) -> Weight:
    data, _ = random_rows(fmt, rows, cols, rng)
    return Weight(
        linear("w", cols, Source("w", rows)), [PackedTensor(torch.from_numpy(data), fmt, rows, cols, heads=heads)]
    )


def packed(weight: Weight, isa: str = "", threads: int = 2) -> bytes:
    native = _walk.Model(threads, isa)
    handles = packing.pack_weights(native, {"w": weight}, set(), None, 0, None)
    return b"".join(native.packed(handles.matrices["w"], i).tobytes() for i in range(len(weight.segments)))


def at_once(data: np.ndarray, fmt: str, cols: int) -> bytes:
    native = _walk.Model(1)
    matrix = native.add_matrix(cols)
    native.add_segment(matrix, FORMATS.index(fmt), data)
    return native.packed(matrix, 0).tobytes()


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [1, 48, 777])
def test_parts_give_the_bytes_of_the_whole(monkeypatch: pytest.MonkeyPatch, fmt: str, rows: int, seed: int) -> None:
    weight = weight_of(fmt, rows, 512, np.random.default_rng([seed, rows]))
    expected = at_once(weight.segments[0].data.numpy(), fmt, 512)
    assert packed(weight) == expected
    for chunk in (1, 17 * weight.nbytes // rows, weight.nbytes - 1):
        monkeypatch.setattr(packing, "CHUNK_BYTES", chunk)
        assert packed(weight) == expected


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_layout_is_that_of_every_instruction_set(fmt: str, seed: int) -> None:
    weight = weight_of(fmt, 53, 256, np.random.default_rng(seed))
    made: dict[str, bytes] = {}
    for isa in TIERS:
        with suppress(ValueError):  # a tier that this processor cannot run
            made[isa] = packed(weight, isa)
    assert "generic" in made
    assert len(made) > 1
    assert len(set(made.values())) == 1


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("heads, head_dim", [(3, 48), (5, 6), (1, 64), (7, 16)])
def test_interleaved_heads(monkeypatch: pytest.MonkeyPatch, heads: int, head_dim: int, seed: int) -> None:
    rows = heads * head_dim
    weight = weight_of("Q5_0", rows, 64, np.random.default_rng(seed), heads)
    moved = unpermute_rope(weight.segments[0].data, heads)
    assert heads * head_dim < 3 or not torch.equal(moved, weight.segments[0].data)
    for first, last in ((0, rows), (1, rows - 1), (rows // 2, rows // 2 + 1)):
        assert torch.equal(weight.segments[0].rows_at(first, last), moved[first:last])
    monkeypatch.setattr(packing, "CHUNK_BYTES", 1)
    assert packed(weight) == at_once(moved.numpy(), "Q5_0", 64)


@pytest.mark.parametrize("first, rows", [(8, 16), (16, 40), (0, 17), (-16, 16), (48, 16)])
def test_rows_that_are_no_whole_tiles_are_refused(first: int, rows: int) -> None:
    native = _walk.Model(1)
    matrix = native.add_matrix(32)
    segment = native.reserve_segment(matrix, FORMATS.index("F32"), 50)
    with pytest.raises(ValueError, match="whole tiles"):
        native.pack_rows(matrix, segment, first, np.zeros((rows, 128), np.uint8))


@pytest.mark.parametrize("seed", [SEED])
def test_the_file_leaves_memory_while_it_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, cols, heads = 4096, 512, 8
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(rows, cols, generator=generator) for name in "abc"}, path)
    table = WeightTable()
    table.add(linear("ab", cols, Source("a", rows), Source("b", rows, "unpermute_rope", heads)))
    table.add(linear("c", cols, Source("c", rows)))
    weights = load_weights(open_safetensors(path), table)
    held: list[int] = []
    monkeypatch.setattr(packing, "CHUNK_BYTES", 1 << 20)
    native = _walk.Model(2)
    packing.pack_weights(native, weights, set(), None, 0, lambda done, total: held.append(resident(path)))
    assert len(held) == 25
    # Of 24 MiB: a part, a head of b, and what the system maps with the ends of a part, up to 2 MiB at each.
    assert max(held) <= 6 << 20
    assert held[-1] <= 4 << 20
    (row,) = weights["ab"].segments[1].rows_at(7, 8).numpy().view(np.float32)
    out = np.empty(cols, np.float32)
    native.unpack_row(0, rows + 7, out)
    assert (out == row).all()
