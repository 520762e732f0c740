import pytest
import torch

from tests.seeds import SEED
from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.formats.blocks import BLOCKS
from tokenspeed.weights.dummy import dummy_bytes, dummy_weights
from tokenspeed.weights.spec import WeightSpec, WeightTable

TABLE = WeightTable()
TABLE.add(WeightSpec("up", (129, 512), "linear", (), ()))
TABLE.add(WeightSpec("embed", (267, 256), "embedding", (), ()))
TABLE.add(WeightSpec("norm", (513,), "vector", (), ()))
TABLE.add(WeightSpec("experts", (5, 26, 256), "experts", (), ()))
TABLE.add(WeightSpec("biases", (19, 27), "vector", (), ()))


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("fmt", BLOCKS)
def test_shapes_formats_and_spread(fmt, seed):
    weights = dummy_weights(TABLE, fmt, seed)
    for name in ("up", "embed", "experts"):
        values = weights[name].unpacked(torch.float32)
        assert weights[name].formats == (fmt,)
        assert values.shape == weights[name].shape == TABLE.specs[name].shape
        assert abs(values.mean()) < 4e-3
        assert 0.018 < values.std() < 0.022
    norm = weights["norm"].unpacked(torch.float32)
    assert norm.shape == (513,)
    assert weights["biases"].unpacked(torch.float32).shape == (19, 27)
    assert abs(norm.mean() - 1) < 0.01
    assert 0 < (norm - 1).abs().max() < 0.2


@pytest.mark.parametrize("seed", [SEED])
def test_same_seed_same_weights(seed):
    first, again, other = (dummy_weights(TABLE, "Q8_0", s) for s in (seed, seed, seed + 1))
    for name in TABLE.specs:
        assert torch.equal(first[name].segments[0].data, again[name].segments[0].data)
        assert not torch.equal(first[name].segments[0].data, other[name].segments[0].data)


def test_their_bytes_are_known_before():
    assert dummy_bytes(TABLE) == sum(weight.nbytes for weight in dummy_weights(TABLE).values())


def test_format_per_weight_and_refusals():
    weights = dummy_weights(TABLE, {"up": "Q4_K"})
    assert weights["up"].formats == ("Q4_K",)
    assert weights["embed"].formats == ("BF16",)
    with pytest.raises(UnsupportedError, match="IQ1_S"):
        dummy_weights(TABLE, "IQ1_S")
    narrow = WeightTable()
    narrow.add(WeightSpec("w", (3, 640), "linear", (), ()))
    with pytest.raises(FormatError, match="multiple of 256"):
        dummy_weights(narrow, "Q4_K")
