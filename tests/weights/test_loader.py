from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from tests.quantization.blocks_data import oracle, random_rows
from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError, WeightError
from tokenspeed.formats.blocks import BLOCKS
from tokenspeed.formats.checkpoint import TensorInfo
from tokenspeed.formats.gguf import open_gguf
from tokenspeed.formats.safetensors import open_safetensors
from tokenspeed.weights.loader import load_weights
from tokenspeed.weights.packed import unpermute_rope
from tokenspeed.weights.spec import Source, WeightSpec, WeightTable


@dataclass
class Memory:
    """A checkpoint of arrays: (format, shape, uint8 bytes)."""

    format: str
    arrays: dict[str, tuple[str, tuple[int, ...], np.ndarray]]
    path: Path = Path("memory")
    tensors: dict[str, TensorInfo] = field(init=False)

    def __post_init__(self):
        self.tensors = {n: TensorInfo(n, shape, fmt, 0, data.size) for n, (fmt, shape, data) in self.arrays.items()}

    def data(self, name):
        flat = self.arrays[name][2].reshape(-1)
        flat.flags.writeable = False
        return flat


def table(*specs: WeightSpec, ignored: tuple[str, ...] = ()) -> WeightTable:
    made = WeightTable(ignored=ignored)
    for spec in specs:
        made.add(spec)
    return made


def linear(name: str, cols: int, *sources: Source) -> WeightSpec:
    return WeightSpec(name, (sum(s.rows for s in sources), cols), "linear", sources, sources)


def vector(name: str, *sources: Source) -> WeightSpec:
    return WeightSpec(name, (sum(s.rows for s in sources),), "vector", sources, sources)


def plain(values: torch.Tensor) -> tuple[str, tuple[int, ...], np.ndarray]:
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}
    return names[values.dtype], tuple(values.shape), values.reshape(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize("seed", [SEED])
def test_stacked_segments_of_different_formats(seed):
    rng, cols = np.random.default_rng(seed), 256
    rows = dict(zip(BLOCKS, rng.integers(1, 40, len(BLOCKS)).tolist(), strict=True))
    arrays = {fmt: (fmt, (count, cols), random_rows(rng, fmt, count, cols)) for fmt, count in rows.items()}
    spec = linear("qkv", cols, *(Source(fmt, count) for fmt, count in rows.items()))
    checkpoint = Memory("gguf", arrays)
    weight = load_weights(checkpoint, table(spec))["qkv"]
    expected = torch.from_numpy(np.concatenate([oracle(data, fmt) for fmt, _, data in arrays.values()]))
    assert weight.shape == (sum(rows.values()), cols)
    assert weight.formats == tuple(BLOCKS)
    assert weight.nbytes == sum(data.size for _, _, data in arrays.values())
    assert torch.equal(weight.unpacked(torch.float32), expected)
    assert torch.equal(weight.unpacked(torch.bfloat16), expected.bfloat16())
    for segment, (_, _, data) in zip(weight.segments, arrays.values(), strict=True):
        assert segment.data.data_ptr() == data.ctypes.data, "an untransformed tensor was copied"


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("heads, head_dim", [(1, 2), (4, 6), (3, 64)])
def test_unpermute_rope_is_the_inverse_of_the_converter(heads, head_dim, seed):
    rng, cols = np.random.default_rng(seed), 32
    original = rng.standard_normal((heads * head_dim, cols)).astype(np.float32)
    # What the converter does: per head, rows (2, half) to (half, 2).
    stored = np.ascontiguousarray(
        original.reshape(heads, 2, head_dim // 2, cols).swapaxes(1, 2).reshape(original.shape)
    )
    assert torch.equal(unpermute_rope(torch.from_numpy(stored), heads), torch.from_numpy(original))
    theirs = LlamaTensorProcessor({"num_attention_heads": heads, "num_key_value_heads": heads})
    processed = theirs.process(stored, "blk.0.attn_q.weight").weights
    assert (unpermute_rope(torch.from_numpy(stored), heads).numpy() == processed).all()

    packed = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
    source = Source("q", heads * head_dim, "unpermute_rope", heads)
    bias = Source("b", heads * head_dim, "unpermute_rope", heads)
    checkpoint = Memory(
        "gguf", {"q": ("Q8_0", stored.shape, packed), "b": plain(torch.from_numpy(stored[:, 0].copy()))}
    )
    weights = load_weights(checkpoint, table(linear("q", cols, source), vector("b", bias)))
    expected = theirs.process(oracle(packed, "Q8_0"), "blk.0.attn_q.weight").weights
    assert weights["q"].formats == ("Q8_0",)
    assert (weights["q"].unpacked(torch.float32).numpy() == expected).all()
    assert (weights["b"].unpacked(torch.float32).numpy() == original[:, 0]).all()


def test_unpermute_rope_refuses_odd_heads():
    for rows, heads in ((6, 2), (8, 3), (8, 0)):
        with pytest.raises(ValueError, match="heads of an even size"):
            unpermute_rope(torch.zeros(rows, 2), heads)


@pytest.mark.parametrize("seed", [SEED])
def test_vectors_are_float32_with_transforms(seed):
    torch.manual_seed(seed)
    norm, first, second = torch.randn(7).bfloat16(), torch.randn(3).half(), torch.randn(5)
    checkpoint = Memory("safetensors", {"n": plain(norm), "p": plain(first), "q": plain(second)})
    made = load_weights(
        checkpoint,
        table(vector("norm", Source("n", 7, "add_one")), vector("bias", Source("p", 3), Source("q", 5, factor=0.3))),
    )
    assert torch.equal(made["norm"].unpacked(torch.float32), norm.float() + 1)
    assert torch.equal(made["bias"].unpacked(torch.float32), torch.cat((first.float(), second * 0.3)))
    assert made["norm"].formats == ("F32",)
    assert made["norm"].shape == (7,)
    assert torch.equal(made["norm"].unpacked(torch.bfloat16), (norm.float() + 1).bfloat16())


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("fmt", ["F32", "BF16", "Q8_0", "Q6_K"])
def test_experts_of_tensors_of_all_of_them(seed, fmt):
    """Of each expert the rows of two tensors, as views."""
    rng, count, ff, cols = np.random.default_rng(seed), 3, 5, 256
    arrays = {name: (fmt, (count, ff, cols), random_rows(rng, fmt, count * ff, cols)) for name in ("gate", "up")}
    sources = tuple(
        Source(name, ff, first=e * ff, shape=(count, ff, cols)) for e in range(count) for name in ("gate", "up")
    )
    steps = []
    specs = table(WeightSpec("w", (count, 2 * ff, cols), "experts", sources, sources))
    weight = load_weights(Memory("gguf", arrays), specs, lambda done, total: steps.append((done, total)))["w"]
    gate, up = (torch.from_numpy(oracle(data, fmt)).view(count, ff, cols) for _, _, data in arrays.values())
    assert torch.equal(weight.unpacked(torch.float32), torch.cat((gate, up), dim=1))
    assert weight.nbytes == sum(data.size for _, _, data in arrays.values())
    assert steps == [(weight.nbytes, weight.nbytes)]
    start = arrays["up"][2].ctypes.data
    assert weight.segments[5].data.data_ptr() == start + 2 * arrays["up"][2].size // 3, "a slice was copied"


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turned_experts_whose_gate_and_up_come_by_turns(seed, dtype):
    torch.manual_seed(seed)
    count, ff, hidden = 3, 5, 8
    both, bias = torch.randn(count, hidden, 2 * ff).to(dtype), torch.randn(count, 2 * ff).to(dtype)
    checkpoint = Memory("safetensors", {"w": plain(both), "b": plain(bias)})
    rows = count * 2 * ff
    pairs = Source("w", rows, "unpermute_rope", count, shape=both.shape, transposed=True)
    biases = Source("b", rows, "unpermute_rope", count, shape=bias.shape)
    specs = (
        WeightSpec("w", (count, 2 * ff, hidden), "experts", (pairs,), ()),
        WeightSpec("b", (count, 2 * ff), "vector", (biases,), ()),
    )
    made = load_weights(checkpoint, table(*specs))
    turned = both.transpose(1, 2)
    expected = torch.cat((turned[:, ::2], turned[:, 1::2]), dim=1)
    assert torch.equal(made["w"].unpacked(dtype), expected)
    assert torch.equal(made["b"].unpacked(torch.float32), torch.cat((bias[:, ::2], bias[:, 1::2]), dim=1).float())
    quantised = ("Q8_0", (3, 8, 32), np.zeros((24, 34), np.uint8))
    turned = Source("w", 96, shape=(3, 8, 32), transposed=True)
    with pytest.raises(UnsupportedError, match="'w' of type Q8_0"):
        load_weights(
            Memory("safetensors", {"w": quantised}), table(WeightSpec("w", (3, 32, 8), "experts", (turned,), ()))
        )


def test_experts_one_by_one_or_stacked():
    values = torch.arange(24.0).view(2, 3, 4)
    single = tuple(Source(f"experts.{e}", 3) for e in range(2))
    spec = WeightSpec("w", (2, 3, 4), "experts", single, (), (Source("experts", 6, shape=(2, 3, 4)),))
    for arrays in ({"experts": plain(values)}, {f"experts.{e}": plain(values[e]) for e in range(2)}):
        weight = load_weights(Memory("safetensors", arrays), table(spec))["w"]
        assert torch.equal(weight.unpacked(torch.float32), values)
    with pytest.raises(WeightError, match=r"lacks 1 tensor: 'experts.1'"):
        load_weights(Memory("safetensors", {"experts.0": plain(values[0])}), table(spec))
    with pytest.raises(WeightError, match=r"'experts' \[3, 2, 4\] instead of \[2, 3, 4\]"):
        load_weights(Memory("safetensors", {"experts": plain(values.view(3, 2, 4))}), table(spec))


@pytest.mark.parametrize("seed", [SEED])
def test_from_real_files_without_copy_or_warning(tmp_path, seed, recwarn):
    torch.manual_seed(seed)
    embed, norm = torch.randn(11, 64), torch.randn(64)
    save_file({"embed.weight": embed.bfloat16(), "norm.weight": norm}, tmp_path / "model.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test")
    packed = gguf.quants.quantize(embed.numpy(), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("output_norm.weight", (norm + 1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    both = {"hf": (Source("embed.weight", 11),), "gguf": (Source("token_embd.weight", 11),)}
    specs = table(
        WeightSpec("embed", (11, 64), "embedding", **both),
        WeightSpec(
            "norm", (64,), "vector", (Source("norm.weight", 64, "add_one"),), (Source("output_norm.weight", 64),)
        ),
        WeightSpec("head", (11, 64), "linear", **both),
    )
    steps = []
    hf = load_weights(open_safetensors(tmp_path), specs, lambda done, total: steps.append((done, total)))
    ours = load_weights(open_gguf(tmp_path / "m.gguf"), specs)
    assert not [w for w in recwarn if "writ" in str(w.message)]
    assert torch.equal(hf["embed"].unpacked(torch.bfloat16), embed.bfloat16())
    assert torch.equal(ours["embed"].unpacked(torch.float32), torch.from_numpy(oracle(packed, "Q4_0")))
    assert torch.equal(hf["norm"].unpacked(torch.float32), ours["norm"].unpacked(torch.float32))
    for weights in (hf, ours):
        assert weights["head"].segments[0].data.data_ptr() == weights["embed"].segments[0].data.data_ptr()
    assert steps == [(1408, 3072), (1664, 3072), (3072, 3072)]
    fresh = ours["norm"].unpacked(torch.float32)
    fresh.zero_()
    assert ours["norm"].unpacked(torch.float32).any(), "unpacked() gave the weight's own memory"


def test_plain_types_off_their_alignment_are_copied():
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    buffer = np.zeros(32, dtype=np.uint8)
    start = 1 - buffer.ctypes.data % 4 + 4
    buffer[start : start + 24] = values.view(torch.uint8).numpy().reshape(-1)
    checkpoint = Memory("safetensors", {"w": ("F32", (2, 3), buffer[start : start + 24])})
    weight = load_weights(checkpoint, table(linear("w", 3, Source("w", 2))))["w"]
    assert weight.segments[0].rows_at(1, 2).data_ptr() % 4 == 0
    assert torch.equal(weight.unpacked(torch.float32), values)


def matrix(rows: int, cols: int, dtype: torch.dtype = torch.float32):
    return plain(torch.zeros(rows, cols, dtype=dtype))


def test_missing_and_surplus_tensors_are_named():
    specs = table(*(linear(f"w{i}", 4, Source(f"w{i}", 2)) for i in range(9)), ignored=("rope*", "*.inv_freq"))
    with pytest.raises(WeightError, match=r"lacks 7 tensors: 'w2', 'w3', 'w4', 'w5', 'w6', 'w7', 'w8'$"):
        load_weights(Memory("gguf", {"w0": matrix(2, 4), "w1": matrix(2, 4), "rope_freqs": matrix(1, 1)}), specs)
    many = table(*(linear(f"w{i}", 4, Source(f"w{i}", 2)) for i in range(31)))
    with pytest.raises(WeightError, match=r"lacks 31 tensors: 'w0', .*'w19', ... \(31 in all\)"):
        load_weights(Memory("gguf", {}), many)
    full = {f"w{i}": matrix(2, 4) for i in range(9)}
    with pytest.raises(WeightError, match=r"memory.*has surplus 1 tensor: 'extra'"):
        load_weights(Memory("gguf", {**full, "extra": matrix(1, 1), "a.inv_freq": matrix(1, 1)}), specs)
    renamed = {**full, "other": full["w3"]}
    del renamed["w3"]
    with pytest.raises(WeightError, match=r"lacks 1 tensor: 'w3' and it has surplus 1 tensor: 'other'"):
        load_weights(Memory("gguf", renamed), specs)


def test_wrong_shapes_and_types_are_named():
    specs = table(linear("w", 4, Source("w", 2)), vector("n", Source("n", 4)))
    norm = plain(torch.zeros(4))
    for wrong in (matrix(4, 2), matrix(2, 5), matrix(3, 4), plain(torch.zeros(8))):
        with pytest.raises(WeightError, match=r"wrong shape of 1 tensor: 'w' \[.*\] instead of \[2, 4\]"):
            load_weights(Memory("gguf", {"w": wrong, "n": norm}), specs)
    with pytest.raises(WeightError, match=r"'n' \[1, 4\] instead of \[4\]"):
        load_weights(Memory("gguf", {"w": matrix(2, 4), "n": matrix(1, 4)}), specs)
    with pytest.raises(UnsupportedError, match=r"'w' of type I32 \(supported types: F32, F16"):
        load_weights(Memory("safetensors", {"w": matrix(2, 4, torch.int32), "n": norm}), specs)


def test_tables_that_contradict_themselves():
    arrays = Memory("gguf", {"w": matrix(2, 4)})
    source = (Source("w", 2),)
    with pytest.raises(ValueError, match="do not add up"):
        load_weights(arrays, table(WeightSpec("w", (3, 4), "linear", source, source)))
    with pytest.raises(ValueError, match="do not add up"):
        load_weights(arrays, table(WeightSpec("w", (2, 4), "linear", source, ())))
    for source in (Source("w", 2, "add_one"), Source("w", 2, factor=2.0)):
        with pytest.raises(ValueError, match="are for vectors"):
            load_weights(arrays, table(linear("w", 4, source)))
