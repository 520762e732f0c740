"""Every struct that crosses a process border, filled at random, through bytes and back."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling, StepPlan, StepResult

NUMBERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)


@pytest.mark.parametrize("kind", [StepPlan, StepResult, SequenceUpdate, Request])
@pytest.mark.parametrize("codec", [msgspec.msgpack, msgspec.json])
def test_round_trip(kind, codec):
    @settings(max_examples=40, deadline=None, database=None)
    @given(value=st.data())
    def check(value):
        struct = value.draw(build(kind))
        assert codec.decode(codec.encode(struct), type=kind) == struct

    check()


def build(kind: type) -> st.SearchStrategy:
    """Values of every field, by its type."""
    if kind is Request:
        return st.builds(
            Request,
            request_id=st.text(st.characters(codec="utf-8")),
            prompt_token_ids=st.lists(NUMBERS),
            params=st.builds(SamplingParams, n=st.integers(1, 8), temperature=st.floats(0.1, 2)),
            seed=NUMBERS,
            eos_token_ids=st.lists(NUMBERS),
            cache_salt=st.text(st.characters(codec="utf-8")),
            priority=NUMBERS,
            pooling=st.none() | build(Pooling),
        )
    fields = msgspec.structs.fields(kind)
    values = {field.name: of_type(msgspec.inspect.type_info(field.type)) for field in fields}
    return st.builds(kind, **values)


def of_type(info: msgspec.inspect.Type) -> st.SearchStrategy:
    match info:
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.IntType():
            return NUMBERS
        case msgspec.inspect.FloatType():
            return FLOATS.filter(lambda x: abs(x) != float("inf"))
        case msgspec.inspect.StrType():
            return st.text(st.characters(codec="utf-8"))
        case msgspec.inspect.BytesType():
            return st.binary(max_size=8)
        case msgspec.inspect.LiteralType():
            return st.sampled_from(info.values)
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.ListType():
            return st.lists(of_type(info.item_type), max_size=3)
        case msgspec.inspect.TupleType():
            return st.tuples(*map(of_type, info.item_types))
        case msgspec.inspect.UnionType():
            return st.one_of(*map(of_type, info.types))
        case msgspec.inspect.StructType():
            return build(info.cls)
    raise AssertionError(f"no strategy for {info}")
