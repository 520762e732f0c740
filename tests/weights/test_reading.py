"""Weights brought to a device by readers equal what their files say, whatever the buffers, with nothing twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.formats.test_map_pages import resident
from tests.quantization.blocks_data import oracle, random_rows
from tests.seeds import SEED
from tests.weights.test_loader import linear, table, vector
from tokenspeed.contracts.errors import FormatError
from tokenspeed.formats.checkpoint import Checkpoint
from tokenspeed.formats.gguf import open_gguf
from tokenspeed.formats.safetensors import open_safetensors
from tokenspeed.weights import reading
from tokenspeed.weights.dummy import dummy_weights
from tokenspeed.weights.loader import load_weights
from tokenspeed.weights.reading import read_to
from tokenspeed.weights.spec import Source, WeightSpec, WeightTable

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds what no test expects."""
    empty = torch.empty

    def poisoned(*size: Any, **settings: Any) -> torch.Tensor:
        made = empty(*size, **settings)
        return made.fill_(0xA5 if made.dtype == torch.uint8 else float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)


def descriptors_in(folder: Path) -> int:
    """How many files of a folder this process has open, maps' own included."""
    numbers = [number for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")]
    links = [os.readlink(f"/proc/self/fd/{number}") for number in numbers]
    return sum(link.startswith(str(folder)) for link in links)


def placed(checkpoint: Checkpoint, specs: WeightTable, dtype: torch.dtype, **settings: Any) -> dict[str, torch.Tensor]:
    return dict(read_to(CPU, load_weights(checkpoint, specs), dtype, **settings))


def pairs_apart(rows: torch.Tensor, heads: int, turned: int) -> torch.Tensor:
    """Of each head the first `turned` rows: even ones, then odd ones."""
    made = []
    for head in rows.chunk(heads):
        made += [head[:turned:2], head[1:turned:2], head[turned:]]
    return torch.cat(made)


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("buffer_bytes, readers", [(1, 1), (701, 3), (1 << 20, 2)])
def test_safetensors_of_all_kinds(
    tmp_path: Path, dtype: torch.dtype, seed: int, buffer_bytes: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacked parts of three types, interleaved heads, experts one by one and all in one with rows and columns
    exchanged, vectors; pages of the files stay out of this process."""
    monkeypatch.setattr(reading, "usable_cores", lambda: readers)
    torch.manual_seed(seed)
    cols, sizes = 33, dict(zip("qkv", (12, 6, 5), strict=True))
    kinds = dict(zip("qkv", (torch.float16, torch.bfloat16, torch.float32), strict=True))
    parts = {name: torch.randn(rows, cols).to(kinds[name]) for name, rows in sizes.items()}
    experts = {f"e{i}": torch.randn(3, cols).bfloat16() for i in range(5)}
    both, norm, other = torch.randn(4, cols, 10).to(dtype), torch.randn(17), torch.randn(300, cols).to(dtype)
    first = {**parts, "norm": norm}
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(first, files[0])
    save_file({**experts, "both": both, "other": other}, files[1])
    names = dict.fromkeys(first, files[0].name) | dict.fromkeys((*experts, "both", "other"), files[1].name)
    index = ", ".join(f'"{name}": "{file}"' for name, file in names.items())
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')

    heads = Source("q", 12, "unpermute_rope", 2, 4)
    turned = Source("both", 40, "unpermute_rope", 4, shape=(4, cols, 10), transposed=True)
    single = tuple(Source(name, 3) for name in experts)
    specs = table(
        linear("qkv", cols, heads, Source("k", 6), Source("v", 5)),
        WeightSpec("experts", (5, 3, cols), "experts", single, ()),
        vector("norm", Source("norm", 17, "add_one")),
        WeightSpec("turned", (4, 10, cols), "experts", (turned,), ()),
        linear("other", cols, Source("other", 300)),
        linear("vkv", cols, Source("v", 5), Source("k", 6), Source("v", 5)),
    )
    checkpoint, descriptors = open_safetensors(tmp_path), descriptors_in(tmp_path)
    weights, seen = load_weights(checkpoint, specs), []
    checkpoint.drop_pages()
    made = dict(read_to(CPU, weights, dtype, lambda done, total: seen.append((done, total)), readers, buffer_bytes))
    assert [resident(file) for file in files] == [0, 0], "the map was read"
    assert descriptors_in(tmp_path) == descriptors
    expected = {
        "qkv": torch.cat([pairs_apart(parts["q"], 2, 4).to(dtype), parts["k"].to(dtype), parts["v"].to(dtype)]),
        "experts": torch.stack(list(experts.values())).to(dtype),
        "norm": norm + 1,
        "turned": torch.stack([pairs_apart(matrix.T, 1, 10) for matrix in both]),
        "other": other,
        "vkv": torch.cat([parts[name].to(dtype) for name in "vkv"]),
    }
    assert list(made) == list(expected)
    for name, values in expected.items():
        assert made[name].dtype == values.dtype
        assert torch.equal(made[name], values), name
        assert torch.equal(weights[name].unpacked(values.dtype), values), f"{name} by unpacking"
    total = sum(weight.nbytes for weight in weights.values())
    done = [bytes_ for bytes_, _ in seen]
    assert seen[-1] == (total, total)
    assert done == sorted(set(done))


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("buffer_bytes", [1, 5000])
def test_gguf_blocks_are_unpacked_on_the_way(tmp_path: Path, seed: int, buffer_bytes: int) -> None:
    rng, cols = np.random.default_rng(seed), 512
    formats = ("Q8_0", "Q4_K", "Q6_K", "MXFP4", "F16")
    arrays = {fmt: random_rows(rng, fmt, 7 + 2 * at, cols) for at, fmt in enumerate(formats)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test")
    for fmt, data in arrays.items():
        values = data.view(np.float16) if fmt == "F16" else data
        kind = gguf.GGMLQuantizationType[fmt]
        writer.add_tensor(fmt, values, raw_dtype=None if fmt == "F16" else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    specs = table(linear("all", cols, *(Source(fmt, len(data)) for fmt, data in arrays.items())))
    made = placed(open_gguf(tmp_path / "m.gguf"), specs, torch.float32, buffer_bytes=buffer_bytes)["all"]
    assert torch.equal(made, torch.from_numpy(np.concatenate([oracle(data, fmt) for fmt, data in arrays.items()])))


def one_file(folder: Path, rows: int = 400) -> tuple[Checkpoint, WeightTable, torch.Tensor]:
    values = torch.randn(rows, 64)
    save_file({f"w{i}": values + i for i in range(6)}, folder / "model.safetensors")
    return open_safetensors(folder), table(*(linear(f"w{i}", 64, Source(f"w{i}", rows)) for i in range(6))), values


def test_weights_in_memory_are_copied(tmp_path: Path) -> None:
    specs = one_file(tmp_path)[1]
    weights = dummy_weights(specs, "Q8_0", seed=SEED)
    made = dict(read_to(CPU, weights, torch.float32, buffer_bytes=3000))
    assert all(torch.equal(made[name], weight.unpacked(torch.float32)) for name, weight in weights.items())


def test_no_more_is_read_ahead_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, specs, values = one_file(tmp_path)
    monkeypatch.setattr(reading, "AHEAD_BYTES", 2 * values.nbytes)
    started: list[str] = []
    start = reading._Readers.start

    def counted(self: Any, name: str, *rest: Any) -> Any:
        started.append(name)
        return start(self, name, *rest)

    monkeypatch.setattr(reading._Readers, "start", counted)
    for number, (name, tensor) in enumerate(read_to(CPU, load_weights(checkpoint, specs), torch.float32)):
        assert name == f"w{number}"
        assert torch.equal(tensor, values + number)
        assert len(started) <= number + 3


@pytest.mark.parametrize("change", ["grown", "replaced", "touched"])
def test_a_file_that_changed_is_refused(tmp_path: Path, change: str) -> None:
    checkpoint, specs, _ = one_file(tmp_path)
    path = tmp_path / "model.safetensors"
    if change == "grown":
        with path.open("ab") as file:
            file.write(b"more")
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
    with pytest.raises(FormatError, match=r"model.safetensors: the file was changed while it was loaded"):
        placed(checkpoint, specs, torch.float32)


def test_a_file_that_ends_early_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, specs, _ = one_file(tmp_path)
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: 0)
    descriptors = descriptors_in(tmp_path)
    with pytest.raises(FormatError, match=r"model.safetensors: ends at byte \d+ while it was read"):
        placed(checkpoint, specs, torch.float32)
    assert descriptors_in(tmp_path) == descriptors


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, specs, values = one_file(tmp_path)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: read(descriptor, [buffers[0][:999]], offset))
    for number, tensor in enumerate(placed(checkpoint, specs, torch.float32).values()):
        assert torch.equal(tensor, values + number)


def test_a_consumer_may_leave(tmp_path: Path) -> None:
    checkpoint, specs, values = one_file(tmp_path)
    descriptors = descriptors_in(tmp_path)
    placing_ = read_to(CPU, load_weights(checkpoint, specs), torch.float32)
    assert torch.equal(next(placing_)[1], values)
    placing_.close()  # type: ignore[attr-defined]
    assert descriptors_in(tmp_path) == descriptors
