import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.seeds import SEED
from tokenspeed.contracts.errors import FormatError, ModelNotFoundError, UnsupportedError
from tokenspeed.formats.safetensors import open_safetensors


def raw_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def open_bytes(tmp_path, raw: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    return open_safetensors(path)


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 7),
        "b.weight": torch.randn(3, 3).bfloat16(),
        "c": torch.randn(11).half(),
        "ids": torch.arange(4),
        "scalar": torch.tensor(2.5),
    }


@pytest.mark.parametrize("seed", [SEED])
def test_reads_what_the_library_writes(tmp_path, seed):
    tensors = random_tensors(seed)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for opened in (open_safetensors(tmp_path), open_safetensors(tmp_path / "model.safetensors")):
        assert opened.format == "safetensors"
        assert set(opened.tensors) == set(tensors)
        for name, tensor in tensors.items():
            assert opened.tensors[name].shape == tuple(tensor.shape)
            assert opened.data(name).tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert not opened.data(name).flags.writeable
    assert {name: opened.tensors[name].dtype for name in tensors} == {
        "a.weight": "F32", "b.weight": "BF16", "c": "F16", "ids": "I64", "scalar": "F32",
    }  # fmt: skip


@pytest.fixture
def sharded(tmp_path):
    tensors = random_tensors(SEED)
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "one.safetensors")
    save_file({"c": tensors["c"]}, tmp_path / "two.safetensors")

    def index(weight_map: object) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    index({"a.weight": "one.safetensors", "c": "two.safetensors"})
    return tmp_path, tensors, index


def test_shards(sharded):
    path, tensors, _ = sharded
    opened = open_safetensors(path)
    assert (opened.data("c").view(np.float16) == tensors["c"].numpy()).all()
    assert (opened.data("a.weight").view(np.float32) == tensors["a.weight"].numpy().reshape(-1)).all()


@pytest.mark.parametrize(
    "weight_map, message",
    [
        (
            {"a.weight": "one.safetensors", "c": "three.safetensors"},
            "'c' is mapped to 'three.safetensors', which is missing",
        ),
        ({"a.weight": "one.safetensors", "x": "two.safetensors"}, "'x' is in no shard"),
        ({"a.weight": "../one.safetensors"}, "no file name"),
        ({"a.weight": 3}, "no file name"),
        ({}, "weight_map is missing or empty"),
        ([], "weight_map is missing or empty"),
    ],
)
def test_bad_index(sharded, weight_map, message):
    path, _, index = sharded
    index(weight_map)
    with pytest.raises(FormatError, match=message):
        open_safetensors(path)


def test_tensor_in_two_shards(sharded):
    path, tensors, _ = sharded
    save_file({"c": tensors["c"], "a.weight": tensors["a.weight"]}, path / "two.safetensors")
    with pytest.raises(FormatError, match=r"'a\.weight' is in another shard"):
        open_safetensors(path)


def test_truncated_shard_and_index(sharded):
    path, _, _ = sharded
    shard = path / "two.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"two\.safetensors"):
        open_safetensors(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a')
    with pytest.raises(FormatError, match="not JSON"):
        open_safetensors(path)


CORRUPT = {
    "empty": (b"", "empty"),
    "short": (bytes(7), "truncated"),
    "header length": (struct.pack("<Q", 2**60) + bytes(64), "header length"),
    "not JSON": (raw_file(b"{'a'"), "not JSON"),
    "deep JSON": (raw_file(b"[" * 200_000), "not JSON"),
    "long number": (raw_file(b'{"a": ' + b"9" * 9000 + b"}"), "not JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not JSON"),
    "list": (raw_file([]), "not a JSON object"),
    "name twice": (raw_file(b'{"a": 1, "a": 2}'), "'a' comes twice"),
    "entry": (raw_file({"a": 3}), "'a': its entry"),
    "dtype": (raw_file({"a": entry("F33")}, bytes(24)), "unknown dtype 'F33'"),
    "shape text": (raw_file({"a": entry(shape="23")}, bytes(24)), "shape"),
    "shape negative": (raw_file({"a": entry(shape=[-2, -3])}, bytes(24)), "shape"),
    "shape bool": (raw_file({"a": entry(shape=[True, 6])}, bytes(24)), "shape"),
    "shape float": (raw_file({"a": entry(shape=[2.0, 3])}, bytes(24)), "shape"),
    "offsets": (raw_file({"a": entry(offsets=[24, 0])}, bytes(24)), "data_offsets"),
    "offsets short": (raw_file({"a": entry(offsets=[0])}, bytes(24)), "data_offsets"),
    "size": (raw_file({"a": entry(shape=[2, 4])}, bytes(24)), r"shape \[2, 4\] F32 does not take its 24 bytes"),
    "outside": (raw_file({"a": entry()}, bytes(23)), "the tensors end at"),
    "behind": (raw_file({"a": entry()}, bytes(25)), "the tensors end at"),
    "hole": (raw_file({"a": entry(offsets=[4, 28])}, bytes(28)), "belong to no tensor"),
    "overlap": (raw_file({"a": entry(), "b": entry(offsets=[20, 44])}, bytes(44)), "'a' and 'b' overlap"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_named(tmp_path, case):
    raw, message = CORRUPT[case]
    with pytest.raises(FormatError, match=message) as error:
        open_bytes(tmp_path, raw)
    assert "model.safetensors" in str(error.value)


def test_pickles_and_empty_directories(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"neither model\.safetensors nor"):
        open_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin.*pickle|pickle.*pytorch_model\.bin"):
            open_safetensors(path)
    with pytest.raises(ModelNotFoundError, match="absent"):
        open_safetensors(tmp_path / "absent.safetensors")


VALID = raw_file({"a": entry(), "b": entry("BF16", [5], [24, 34])}, bytes(range(34)))
EDITS = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4)


@pytest.fixture(scope="module")
def fuzz_path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@settings(max_examples=400, deadline=None)
@given(edits=EDITS, keep=st.one_of(st.just(len(VALID)), st.integers(0, len(VALID))))
def test_any_damage_opens_consistently_or_is_reported(fuzz_path, edits, keep):
    raw = bytearray(VALID)
    for at, value in edits:
        raw[at] = value
    fuzz_path.write_bytes(raw[:keep])
    try:
        opened = open_safetensors(fuzz_path)
    except (FormatError, UnsupportedError):
        return
    assert keep == len(VALID), "a truncated file opened"
    assert sum(opened.data(name).size for name in opened.tensors) == 34
