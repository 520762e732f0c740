"""GGUF files in shards: as the gguf package writes them, and damaged in every way."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.formats.gguf_bytes import build, pair, string, tensor, u32
from tests.seeds import SEED
from tokenspeed.contracts.errors import FormatError
from tokenspeed.formats.digest import checkpoint_digest
from tokenspeed.formats.gguf import open_gguf
from tokenspeed.formats.gguf_split import shard_names


def write(path: Path, arrays: dict[str, np.ndarray], **split: Any) -> list[Path]:
    """The files that the gguf package makes of float32 arrays."""
    writer = gguf.GGUFWriter(path, "qwen3", **split)
    writer.add_uint32("marker", 77)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(50)])
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))


def random_arrays(seed: int, count: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(2, 9)), int(rng.integers(20, 70))) for _ in range(count)]
    return {f"w{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize(
    "split, shards",
    [
        ({"split_max_tensors": 1}, 7),
        ({"split_max_tensors": 3}, 3),
        ({"split_max_size": 600}, None),
        ({"split_max_tensors": 4, "small_first_shard": True}, 3),
    ],
)
def test_any_shard_opens_all(tmp_path: Path, split: dict[str, Any], shards: int | None, seed: int) -> None:
    arrays = random_arrays(seed)
    (whole,) = write(tmp_path / "whole.gguf", arrays)
    paths = write(tmp_path / "cut.gguf", arrays, **split)
    assert len(paths) == shards or (shards is None and len(paths) > 1)
    expected = open_gguf(whole)
    for path in paths:
        opened = open_gguf(path)
        assert opened.path == path
        assert opened.files == tuple(paths)
        assert opened.metadata["marker"] == 77
        assert opened.metadata["tokenizer.ggml.tokens"][49] == "t49"
        assert opened.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (opened.data(name).view(np.float32).reshape(array.shape) == array).all()
        assert checkpoint_digest(opened) == checkpoint_digest(expected)
        opened.drop_pages()
        assert (opened.data("w0").view(np.float32) == arrays["w0"].reshape(-1)).all()


@pytest.mark.parametrize("seed", [SEED])
def test_the_digest_covers_every_shard(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {f"w{i}": rng.standard_normal((3, int(rng.integers(4, 70)))).astype(np.float32) for i in range(3)}
    paths = write(tmp_path / "cut.gguf", arrays, split_max_tensors=1)
    digests = {checkpoint_digest(open_gguf(paths[0]))}
    for path in paths:
        raw = bytearray(path.read_bytes())
        raw[-40] ^= 1  # within the tensor: it has 48 bytes or more, its padding at most 31
        path.write_bytes(raw)
        digests.add(checkpoint_digest(open_gguf(paths[0])))
    assert len(digests) == 4


def test_one_of_one_is_whole(tmp_path: Path) -> None:
    for name in ("odd name.gguf", "m-00001-of-00001.gguf"):
        (tmp_path / name).write_bytes(shard(0, 1, 1, [tensor("a", (8,), 0, 0)]))
        assert open_gguf(tmp_path / name).files == (tmp_path / name,)


def test_names() -> None:
    three = [f"a/b-of-x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert all(shard_names(name) == three for name in three)
    for other in ("m.gguf", "m-1-of-3.gguf", "m-00001-of-00003.gguf.part", "m-00001-of-00000.gguf"):
        assert shard_names(other) == [other]


def shard(number: int, count: int, tensors_in_all: int, tensors: list[bytes], extra: tuple[bytes, ...] = ()) -> bytes:
    pairs = [
        pair("split.no", 2, struct.pack("<H", number)),
        pair("split.count", 2, struct.pack("<H", count)),
        pair("split.tensors.count", 5, struct.pack("<i", tensors_in_all)),
        *extra,
    ]
    return build(pairs, tensors, bytes(64 * len(tensors)))


def good_set(folder: Path) -> list[Path]:
    paths = [folder / name for name in shard_names("m-00001-of-00003.gguf")]
    for i, path in enumerate(paths):
        extra = (pair("general.architecture", 8, string("llama")),) if i == 0 else ()
        path.write_bytes(shard(i, 3, 3, [tensor(f"w{i}", (8,), 0, 0)], extra))
    return paths


def replace_second(raw: bytes) -> Callable[[list[Path]], object]:
    return lambda paths: paths[1].write_bytes(raw)


def without(key: str) -> bytes:
    values = {"split.no": (2, "<H", 1), "split.count": (2, "<H", 3), "split.tensors.count": (5, "<i", 3)}
    pairs = [pair(k, kind, struct.pack(fmt, v)) for k, (kind, fmt, v) in values.items() if k != key]
    return build(pairs, [tensor("w1", (8,), 0, 0)], bytes(64))


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def make_directory(paths: list[Path]) -> None:
    remove(paths[1])
    paths[1].mkdir()


W1 = [tensor("w1", (8,), 0, 0)]
DAMAGE: dict[str, tuple[Callable[[list[Path]], object], str]] = {
    "missing": (lambda paths: remove(paths[1]), r"1 of its 3 shards are missing: m-00002-of-00003\.gguf"),
    "two missing": (lambda paths: remove(*paths[1:]), "2 of its 3 shards are missing"),
    "a directory": (make_directory, "shards are missing"),
    "twice the same": (lambda paths: shutil.copy(paths[2], paths[1]), r"m-00002.*: split.no is 2, its name says 1"),
    "another count": (replace_second(shard(1, 2, 3, W1)), r"m-00002.*: split.count is 2, in m-00001.* it is 3"),
    "another total": (replace_second(shard(1, 3, 4, W1)), r"m-00002.*: split.tensors.count is 4, in .* it is 3"),
    "number past the count": (replace_second(shard(3, 3, 3, W1)), r"m-00002.*: split.no is 3, split.count 3"),
    "a whole file": (replace_second(build([], W1, bytes(64))), r"m-00002.*: split.no is None"),
    "no count": (replace_second(without("split.count")), r"m-00002"),
    "no number": (replace_second(without("split.no")), r"m-00002.*split.no must be a number, not None"),
    "no total": (replace_second(without("split.tensors.count")), r"m-00002.*split.tensors.count must be a number"),
    "duplicate": (replace_second(shard(1, 3, 3, [tensor("w0", (8,), 0, 0)])), r"m-00002.*'w0' is in another shard"),
    "too few tensors": (replace_second(shard(1, 3, 3, [])), "its shards hold 2 tensors, split.tensors.count is 3"),
    "another model": (
        replace_second(shard(1, 3, 3, W1, (pair("general.architecture", 8, string("gemma3")),))),
        r"m-00002.*general.architecture is gemma3, in m-00001.* it is llama",
    ),
    "a key of its own": (replace_second(shard(1, 3, 3, W1, (u32("more", 1),))), r"m-00002.*more is 1, in .* None"),
    "broken": (lambda paths: paths[1].write_bytes(b"GGUF"), r"m-00002.*truncated"),
    "empty": (lambda paths: paths[1].write_bytes(b""), r"m-00002.*empty"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_sets_are_named(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    paths = good_set(tmp_path)
    assert len(open_gguf(paths[2]).tensors) == 3
    damage(paths)
    with pytest.raises(FormatError, match=message):
        open_gguf(paths[0])


@pytest.mark.parametrize("name", ["other.gguf", "m-00002-of-00003.gguf", "m-00001-of-00002.gguf", "m-1-of-3.gguf"])
def test_a_shard_under_a_wrong_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(shard(0, 3, 3, W1))
    with pytest.raises(FormatError, match=rf"{re.escape(name)}: this is shard 1 of 3.*NAME-00001-of-00003\.gguf"):
        open_gguf(tmp_path / name)


@pytest.mark.parametrize(
    "key, kind, raw", [("split.count", 8, string("3")), ("split.no", 7, b"\1"), ("split.count", 5, b"\xff" * 4)]
)
def test_split_values_of_a_wrong_kind(tmp_path: Path, key: str, kind: int, raw: bytes) -> None:
    others = [u32(name, 1) for name in ("split.no", "split.count", "split.tensors.count") if name != key]
    (tmp_path / "m.gguf").write_bytes(build([*others, pair(key, kind, raw)], W1, bytes(64)))
    with pytest.raises(FormatError, match=f"{key} must be a number"):
        open_gguf(tmp_path / "m.gguf")


def test_an_alignment_of_each_shards_own(tmp_path: Path) -> None:
    paths = good_set(tmp_path)
    raw = build(
        [*(u32(k, v) for k, v in (("split.no", 1), ("split.count", 3), ("split.tensors.count", 3))),
         u32("general.alignment", 128)],
        W1, np.arange(8, dtype=np.float32).tobytes(), align=128,
    )  # fmt: skip
    paths[1].write_bytes(raw)
    assert open_gguf(paths[0]).data("w1").view(np.float32).tolist() == list(range(8))
