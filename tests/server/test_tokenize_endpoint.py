"""/tokenize and /detokenize over HTTP."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.seeds import SEED
from tests.server.conftest import Serve, Served
from tests.server.fake_engine import BEGIN, EOS, MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine
from tokenspeed.server.openai.prompts import SHORT_TEXT

TALK = [{"role": "user", "content": "hi"}]
LONG = SHORT_TEXT + 1


def post(served: Served, path: str, **fields: Any) -> Any:
    response = served.client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_shape(served: Served) -> None:
    assert post(served, "/tokenize", model="fake", prompt="ab") == {
        "count": 2,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": list(b"ab"),
        "token_strs": None,
    }
    assert post(served, "/detokenize", model="fake", tokens=[*b"ab", EOS]) == {"prompt": "ab<eos>"}


def test_the_tokenizer_tells_of_itself(served: Served) -> None:
    response = served.client.get("/tokenizer_info")
    assert response.status_code == 200
    assert set(response.json()) == {"bos_token", "eos_token", "pad_token", "unk_token", "chat_template"}


@pytest.mark.parametrize("length", [0, 1, 37, LONG])
@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_there_and_back(served: Served, length: int, seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("aé漢<\n", k=length))
    found = post(served, "/tokenize", prompt=text, add_special_tokens=False)
    assert found["count"] == len(found["tokens"]) == len(text.encode())
    assert post(served, "/detokenize", tokens=found["tokens"]) == {"prompt": text}


@pytest.mark.parametrize("asked, special", [(None, True), (True, True), (False, False)])
def test_special_tokens_of_a_prompt(served: Served, asked: bool | None, special: bool) -> None:
    found = post(served, "/tokenize", prompt="<a", add_special_tokens=asked, return_token_strs=True)
    assert found["tokens"] == [BEGIN] * special + list(b"<a")
    assert found["token_strs"] == ["\x01"] * special + ["<", "a"]


def test_messages_are_rendered(served: Served) -> None:
    assert bytes(post(served, "/tokenize", messages=TALK)["tokens"]) == b"User: hi\nAssistant:"
    bare = post(served, "/tokenize", messages=TALK, add_generation_prompt=False)
    assert bytes(bare["tokens"]) == b"User: hi\n"


@pytest.mark.parametrize(
    "path, fields, param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": TALK}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "temperature": 1}, "temperature"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": TALK, "tools": [{}]}, "tools"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1, VOCAB_SIZE]}, "tokens"),
    ],
)
def test_refusals(served: Served, path: str, fields: dict[str, Any], param: str) -> None:
    response = served.client.post(path, json=fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("path, fields", [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
def test_without_a_tokenizer_and_under_another_name(serve: Serve, path: str, fields: dict[str, Any]) -> None:
    served = serve(FakeEngine(tokenizer=None))
    assert served.client.post(path, json=fields).status_code == 400
    assert served.client.post(path, json=fields | {"model": "other"}).status_code == 404
