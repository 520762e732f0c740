"""`LogitsProcessors`: which rows change and how, and what becomes of a request whose processor fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from tests.runner.test_sampler import sampling
from tests.seeds import SEED
from tokenspeed.contracts.step import SamplingRow
from tokenspeed.runner.edits import SampledRow, drawn_plainly
from tokenspeed.runner.processors import LogitsProcessors
from tokenspeed.runner.sampler import sample, sampler_inputs

VOCAB = 77
PROMPT, OUTPUT = [3, 1, 4], [1, 5]
Processor = Callable[..., Any]


def raw(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(SEED % 2**31))


def row_of(number: int, **fields: Any) -> SampledRow:
    """The row whose next token is the third of its output; a draft behind it is not yet there."""
    return SampledRow(sampling(processors=number, **fields), [*PROMPT, *OUTPUT, 70], 3, 5)


def test_only_rows_with_processors_change() -> None:
    processors, logits = LogitsProcessors(), raw(4)
    before = logits.clone()
    assert processors.apply(logits, [row_of(0)] * 4) is logits
    assert not processors
    doubled = processors.add("a", [lambda output, logits: logits.mul_(2)])
    shifted = processors.add("b", [lambda output, logits: logits + 1, lambda output, logits: logits * 3])
    found = processors.apply(logits, [row_of(0), row_of(shifted), row_of(0), row_of(doubled)])
    assert found.equal(torch.stack([before[0], (before[1] + 1) * 3, before[2], before[3] * 2]))
    assert logits.equal(before)
    assert processors
    assert processors.take_failures() == []
    processors.drop("a")
    processors.drop("never there")
    processors.drop("b")
    assert not processors


def test_a_processor_gets_ids_of_its_own() -> None:
    seen: list[tuple[list[int], ...]] = []

    def spoil(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((prompt.copy(), output.copy()))
        prompt.clear()
        output.append(-1)
        assert (logits.shape, logits.dtype) == ((VOCAB,), torch.float32)
        return logits

    def look(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((output,))
        return logits

    processors = LogitsProcessors()
    row = row_of(processors.add("a", [spoil, look]))
    for _ in range(2):
        processors.apply(raw(1), [row])
    assert seen == [(PROMPT, OUTPUT), (OUTPUT,)] * 2
    assert row.tokens == [*PROMPT, *OUTPUT, 70]


def failing(how: str) -> Processor:
    def stumble(output: list[int], logits: torch.Tensor) -> Any:
        logits.fill_(-5.0)
        if how == "raises":
            return logits[VOCAB]
        return {
            "none": None,
            "shape": logits[1:],
            "rows": logits[None],
            "dtype": logits.double(),
            "a nan": logits.index_fill(0, torch.tensor([4]), torch.nan),
            "all nan": torch.full_like(logits, torch.nan),
            "inf": logits.index_fill(0, torch.tensor([4]), torch.inf),
            "nothing": torch.full_like(logits, -torch.inf),
        }[how]

    return stumble


@pytest.mark.parametrize(
    "how, complaint",
    [
        ("none", "gave NoneType, not a tensor"),
        ("shape", r"gave logits of shape \[76\] instead of \[77\]"),
        ("rows", r"gave logits of shape \[1, 77\] instead of \[77\]"),
        ("dtype", "gave logits of torch.float64 instead of torch.float32"),
        ("a nan", "gave NaN for 1 of 77 tokens"),
        ("all nan", "gave NaN for 77 of 77 tokens"),
        ("inf", r"gave \+inf"),
        ("nothing", "gave -inf for every token"),
        ("raises", "raised IndexError: "),
    ],
)
def test_a_failure_is_the_requests_own(how: str, complaint: str) -> None:
    processors, logits, calls = LogitsProcessors(), raw(3), []

    def count(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(output))
        return logits

    bad = processors.add("bad", [count, failing(how)])
    good = processors.add("good", [lambda output, logits: -logits])
    rows = [row_of(bad), row_of(good), row_of(bad, sample_index=1)]
    for _ in range(2):
        assert processors.apply(logits, rows).equal(torch.stack([logits[0], -logits[1], logits[2]]))
    assert calls == [2]
    ((request_id, error),) = processors.take_failures()
    assert request_id == "bad"
    text = rf"^request bad: logits processor failing\.<locals>\.stumble \(2 of 2\) {complaint}"
    with pytest.raises(type(error), match=text):
        raise error
    assert isinstance(error.__cause__, IndexError if how == "raises" else type(None))
    assert processors.take_failures() == []


def test_an_interrupt_is_no_failure() -> None:
    def interrupt(output: list[int], logits: torch.Tensor) -> None:
        raise KeyboardInterrupt

    processors = LogitsProcessors()
    with pytest.raises(KeyboardInterrupt):
        processors.apply(raw(1), [row_of(processors.add("a", [interrupt]))])
    assert processors.take_failures() == []


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_edits_come_after_processors_and_log_probabilities_are_raw(temperature: float) -> None:
    """A processor cannot bring back what another parameter forbids."""
    logits, processors = raw(2), LogitsProcessors()
    number = processors.add("a", [lambda output, logits: logits.index_fill(0, torch.tensor([8, 9]), 60.0)])
    rows = [row_of(number, temperature=temperature, banned_ids=[8], logprobs=0), row_of(0, temperature=temperature)]
    assert not drawn_plainly(row_of(number))
    assert drawn_plainly(rows[1])
    inputs = sampler_inputs(rows, VOCAB, torch.device("cpu"))
    found = sample(logits, inputs, processed=processors.apply(logits, rows))
    alone = sample(logits[1:], sampler_inputs(rows[1:], VOCAB, torch.device("cpu")))
    assert found.tokens.tolist() == [9, *alone.tokens.tolist()]
    assert found.logprobs is not None
    assert found.logprobs.logprobs.tolist() == pytest.approx([logits[0].log_softmax(-1)[9].item()])


def test_a_row_keeps_its_number_through_bytes() -> None:
    row = sampling(processors=12)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=SamplingRow) == row
