"""While prompts run, the garbage collector leaves alone what was there before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.tiny_llama import VOCAB
from tokenspeed.contracts.errors import PromptError
from tokenspeed.contracts.request import SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM

PARAMS = SamplingParams(temperature=0, max_tokens=2)


@pytest.fixture
def thawed() -> Iterator[None]:
    """Whatever other tests of this process left."""
    gc.unfreeze()
    yield
    gc.unfreeze()


def watched(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many objects are left alone at each step."""
    seen: list[int] = []
    step = llm.core.step

    def counted() -> list[SequenceUpdate]:
        seen.append(gc.get_freeze_count())
        return step()

    monkeypatch.setattr(llm.core, "step", counted)
    return seen


@pytest.mark.usefixtures("thawed")
def test_what_is_there_is_left_alone_while_prompts_run(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(llm, monkeypatch)
    llm.generate([[1, 2, 3]], PARAMS, use_tqdm=False)
    assert len(seen) >= 2
    assert min(seen) > 1000
    assert gc.get_freeze_count() == 0
    with pytest.raises(PromptError):
        llm.generate([[VOCAB]], PARAMS, use_tqdm=False)
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("thawed")
def test_what_a_caller_froze_stays_frozen(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    llm.generate([[1, 2, 3]], PARAMS, use_tqdm=False)
    assert 0 < gc.get_freeze_count() <= before
