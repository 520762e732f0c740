import struct
import time
from itertools import pairwise

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.gguf_bytes import build, pair, small, string, strings, tensor, u32
from tests.seeds import SEED
from tokenspeed.contracts.errors import FormatError, ModelNotFoundError, UnsupportedError
from tokenspeed.formats.gguf import open_gguf

F32_ROW = tensor("a", (8,), 0, 0)


def open_bytes(tmp_path, raw: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    return open_gguf(path)


@pytest.mark.parametrize("seed", [SEED])
def test_reads_what_the_gguf_package_writes(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    tokens = ["".join(map(chr, rng.integers(32, 0x800, rng.integers(0, 40)))) for _ in range(1001)]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("scores", [float(np.float32(x)) for x in rng.standard_normal(1001)])
    writer.add_array("kinds", [int(x) for x in rng.integers(-9, 9, 77)])
    writer.add_bool("flag", False)
    writer.add_uint64("big", 2**63 + 1)
    writer.add_int8("small", -7)
    writer.add_float64("pi", 3.141592653589793)
    arrays = {"w": rng.standard_normal((3, 64)).astype(np.float32), "v": rng.standard_normal(7).astype(np.float16)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    packed = gguf.quants.quantize(arrays["w"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = open_gguf(path)
    assert file.format == "gguf"
    assert file.metadata["tokenizer.ggml.tokens"] == tokens
    reader = gguf.GGUFReader(path)
    for key in ("scores", "kinds", "flag", "big", "small", "pi", "general.architecture"):
        assert file.metadata[key] == reader.fields[key].contents()
    assert {n: (t.shape, t.dtype) for n, t in file.tensors.items()} == {
        "w": ((3, 64), "F32"),
        "v": ((7,), "F16"),
        "q": ((3, 64), "Q8_0"),
    }
    assert (file.data("w").view(np.float32).reshape(3, 64) == arrays["w"]).all()
    assert (file.data("v").view(np.float16) == arrays["v"]).all()
    assert (file.data("q") == packed.reshape(-1)).all()
    assert not file.data("w").flags.writeable
    with pytest.raises(KeyError):
        file.metadata["absent"]


@pytest.mark.parametrize("seed", [SEED])
def test_string_arrays_of_any_content(tmp_path, seed):
    """Long strings, empty ones, NULs and text that looks like length fields, across several scan windows."""
    rng = np.random.default_rng(seed)
    odd = ["", "\0" * 9, "\x03\0\0\0\0\0\0\0abc", "y" * 255, "z" * 256, "w" * 70_000, "日本"]
    words = [
        odd[rng.integers(len(odd))] if rng.random() < 0.02 else "t" * int(rng.integers(0, 20)) for _ in range(20_000)
    ]
    plain = [word for word in words if "\0" not in word]
    file = open_bytes(tmp_path, build([strings("odd", words), strings("plain", plain), u32("after", 5)]))
    assert file.metadata["after"] == 5
    assert file.metadata["plain"] == plain
    assert file.metadata["odd"] == words
    assert list(file.metadata) == ["odd", "plain", "after"]


def test_alignment_and_version_2(tmp_path):
    tensors = [tensor("a", (4,), 0, 0), tensor("b", (4,), 0, 128)]
    file = open_bytes(tmp_path, build([u32("general.alignment", 128)], tensors, bytes(144), version=2, align=128))
    assert file.version == 2
    assert file.tensors["a"].offset % 128 == 0
    assert file.tensors["b"].offset - file.tensors["a"].offset == 128


HUGE = 2**62
CORRUPT = {
    "empty": (b"", "empty"),
    "magic": (b"GGML" + build()[4:], "not a GGUF file"),
    "short": (b"GG", "truncated: the magic number"),
    "version": (build(version=9), "unknown GGUF version 9"),
    "version 1": (build(version=1), "unknown GGUF version 1"),
    "tensor count": (build(tensor_count=HUGE), "tensor count"),
    "pair count": (build(pair_count=HUGE), "metadata count"),
    "key length": (build([struct.pack("<Q", HUGE) + bytes(64)]), "metadata key 0 needs"),
    "key not UTF-8": (build([string(b"\xff") + struct.pack("<II", 4, 1)]), "UTF-8"),
    "key twice": (build([u32("k", 1), u32("k", 2)]), "'k' comes twice"),
    "key empty": (build([u32("", 1)]), "empty"),
    "value type": (build([pair("k", 77, bytes(8))]), "'k' has the unknown value type 77"),
    "array length": (build([pair("k", 9, struct.pack("<IQ", 6, HUGE))]), "array length of metadata key 'k'"),
    "array bytes": (build([pair("k", 9, struct.pack("<IQ", 12, 9))], data=bytes(20)), "'k' needs 72 bytes"),
    "strings length": (build([pair("k", 9, struct.pack("<IQ", 8, HUGE))]), "array length of metadata key 'k'"),
    "string in array": (build([pair("k", 9, struct.pack("<IQQ", 8, 2, HUGE) + bytes(30))]), "'k' needs"),
    "alignment": (build([u32("general.alignment", 12)]), "power of two"),
    "alignment text": (build([pair("general.alignment", 8, string("32"))]), "power of two"),
    "name twice": (build([], [F32_ROW, F32_ROW], bytes(64)), "'a' comes twice"),
    "no dimensions": (build([], [tensor("a", (), 0, 0)], bytes(64)), "0 dimensions"),
    "many dimensions": (build([], [tensor("a", (1,) * 5, 0, 0)], bytes(64)), "5 dimensions"),
    "empty dimension": (build([], [tensor("a", (4, 0), 0, 0)], bytes(64)), "empty shape"),
    "huge dimension": (build([], [tensor("a", (2**63, 2**63), 0, 0)], bytes(64)), "the file ends at"),
    "type id": (build([], [tensor("a", (32,), 99, 0)], bytes(128)), "unknown type id 99"),
    "row of blocks": (build([], [tensor("a", (33,), 8, 0)], bytes(128)), "'a': a Q8_0 row holds a multiple of 32"),
    "offset": (build([], [tensor("a", (8,), 0, 8)], bytes(64)), "no multiple of 32"),
    "offset outside": (build([], [tensor("a", (8,), 0, HUGE)], bytes(64)), "the file ends at"),
    "truncated data": (build([], [F32_ROW], bytes(31)), "needs bytes"),
    "overlap": (build([], [tensor("a", (16,), 0, 0), tensor("b", (8,), 0, 32)], bytes(64)), "'a' and 'b' overlap"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_named(tmp_path, case):
    raw, message = CORRUPT[case]
    with pytest.raises(FormatError, match=message) as error:
        open_bytes(tmp_path, raw)
    assert "model.gguf" in str(error.value)


@pytest.mark.parametrize(
    "raw, message",
    [
        (build()[:4] + struct.pack(">I", 3) + build()[8:], "big-endian"),
        (build([], [tensor("a", (256,), 22, 0)], bytes(96)), r"'a' has the unsupported type IQ2_S \(supported: F32,"),
        (build([pair("k", 9, struct.pack("<IQ", 9, 0))]), "array of arrays"),
    ],
)
def test_unsupported_files_are_named(tmp_path, raw, message):
    with pytest.raises(UnsupportedError, match=message):
        open_bytes(tmp_path, raw)


def test_missing_file(tmp_path):
    with pytest.raises(ModelNotFoundError, match="absent"):
        open_gguf(tmp_path / "absent.gguf")


def test_strings_that_are_not_utf8_fail_when_read(tmp_path):
    file = open_bytes(tmp_path, build([strings("k", [b"ok", b"\xff"])]))
    with pytest.raises(FormatError, match="'k' is not UTF-8"):
        file.metadata["k"]


def test_a_vocabulary_costs_little_until_it_is_read(tmp_path):
    """Strings that break every fast run must not make the scan quadratic either."""
    hostile = ["\0" * 7] * 30_000
    path = tmp_path / "model.gguf"
    path.write_bytes(build([strings("k", hostile)]))
    start = time.process_time()
    assert len(open_gguf(path).metadata["k"]) == len(hostile)
    assert time.process_time() - start < 2


def touch(file) -> None:
    dict(file.metadata)
    spans = []
    for name, info in file.tensors.items():
        assert info.nbytes > 0
        assert file.data(name).size == info.nbytes
        spans.append((info.offset, info.offset + info.nbytes))
    spans.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


@pytest.fixture(scope="module")
def fuzz_path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


VALID = small(np.random.default_rng(SEED))
EDITS = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=0, max_size=4)


@settings(max_examples=400, deadline=None)
@given(edits=EDITS, keep=st.one_of(st.just(len(VALID)), st.integers(0, len(VALID))))
def test_any_damage_opens_consistently_or_is_reported(fuzz_path, edits, keep):
    raw = bytearray(VALID)
    for at, value in edits:
        raw[at] = value
    fuzz_path.write_bytes(raw[:keep])
    try:
        touch(open_gguf(fuzz_path))
    except (FormatError, UnsupportedError):
        return
    assert keep == len(VALID), "a truncated file opened"
