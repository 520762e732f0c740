"""Requests that are made of /openapi.json, good ones and bad ones: nothing breaks, hangs, or answers otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.specs.openapi import checks

from tests.seeds import SEED
from tests.server.conftest import Serve
from tests.server.fake_engine import VOCAB_SIZE, FakeEngine
from tests.server.server_process import ServerProcess, started
from tests.tiny_llama import VOCAB, write_tiny
from tokenspeed.engine.trace import Span
from tokenspeed.server.operations import OPERATIONS

FEW_SEED = 1
"""Of the few requests of every run; many, and others each time, are made at length."""
CALL_LIMIT_S = 20.0
"""What is silent for longer hangs."""
CONFORMS = [
    checks.status_code_conformance,  # 500 is documented nowhere
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
GOOD, BAD = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
POSTS = [operation.path for operation in OPERATIONS if operation.takes is not None]
GETS = [operation.path for operation in OPERATIONS if operation.takes is None]
SCORING = ("/v1/score", "/v1/rerank", "/rerank")
GENERATING = ("/v1/completions", "/v1/chat/completions")
REFUSAL = "refused by the engine"
"""By the fake one, of prompts that begin with a certain id."""
TALK = [{"role": "user", "content": "hi"}]
USAGE = {"include_usage": True}


def test_every_route_has_a_generator() -> None:
    assert {operation.method for operation in OPERATIONS} == {"get", "post"}
    assert len(POSTS) + len(GETS) == len(OPERATIONS)
    assert set(GENERATING) < set(POSTS)


def narrow(schema: Any, vocab: int) -> None:
    """Bound ids, wherever they are."""
    if isinstance(schema, dict):
        if schema.get("type") == "integer" and schema.get("minimum") == 0:
            schema["maximum"] = vocab - 1
        for part in schema.values():
            narrow(part, vocab)
    for part in schema if isinstance(schema, list) else ():
        narrow(part, vocab)


class Api:
    """One server's schema, narrowed to the model: its name and its vocabulary, of which the document cannot know."""

    def __init__(self, url: str, model: str, vocab: int) -> None:
        self._url, self._session = url, requests.Session()
        document = self._session.get(f"{url}/openapi.json", timeout=CALL_LIMIT_S).json()
        for schema in document["components"]["schemas"].values():
            if "model" in (properties := schema["properties"]) and schema["title"].endswith("Request"):
                properties["model"] = {"enum": [None, model]}
                narrow(properties, vocab)
        self.document = document
        self.schema: Any = schemathesis.openapi.from_dict(document, config=schemathesis.Config())

    def close(self) -> None:
        self._session.close()

    def send(self, case: Any, mode: Any = GOOD) -> Any:
        """Send a request, check what is answered."""
        response = case.call(base_url=self._url, session=self._session, timeout=CALL_LIMIT_S)
        rejected = [checks.negative_data_rejection] if mode is BAD else []
        case.validate_response(response, checks=CONFORMS + rejected)
        return response

    def fields(self, path: str) -> set[str]:
        schema = self.document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return set(self.document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"])


def pointless(value: Any) -> Any:
    """1.0 is an integer in JSON schema, and not here: written without a point."""
    if isinstance(value, dict):
        return {name: pointless(each) for name, each in value.items()}
    if isinstance(value, list):
        return [pointless(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def fuzz(api: Api, path: str, mode: Any, seed: int, examples: int) -> None:
    """Good requests to routes of operators are taken; what is asked of a model also depends on its length and on pairs
    of fields, and a refusal must name one."""
    operation = api.schema[path]["post"]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(mode))
    def run(case: Any) -> None:
        if mode is GOOD:
            case.body = pointless(case.body)
        response = api.send(case, mode)
        if mode is GOOD and response.status_code != 200:
            error = response.json()["error"]
            named = re.split(r"[.\[]", error["param"] or "")[0]
            told = {named} if named else set(re.findall(r"\w+", error["message"]))
            assert "/admin/" not in path, error
            assert told & api.fields(path) or error["message"] == REFUSAL, error

    run()


@pytest.fixture
def api(serve: Serve, tmp_path: Path) -> Iterator[Api]:
    served = serve(chat_template="plain", max_n=3, max_choices=6)
    served.state.profile_dir = tmp_path

    async def profile(steps: int, timeout: float) -> list[Span]:
        return await FakeEngine().profile(min(steps, 3), timeout)

    served.engine.profile = profile  # type: ignore[assignment,method-assign]
    made = Api(served.url, "fake", VOCAB_SIZE)
    yield made
    made.close()


@pytest.mark.parametrize("mode", [GOOD, BAD], ids=["good", "bad"])
@pytest.mark.parametrize("path", POSTS)
def test_generated_requests(api: Api, path: str, mode: Any) -> None:
    fuzz(api, path, mode, FEW_SEED, 20 if path in GENERATING else 6)


@pytest.fixture
def scoring_api(serve: Serve) -> Iterator[Api]:
    """A classifier of one label, which takes any two texts."""
    served = serve(FakeEngine(num_labels=1), max_choices=6)
    made = Api(served.url, "fake", VOCAB_SIZE)
    yield made
    made.close()


@pytest.mark.parametrize("mode", [GOOD, BAD], ids=["good", "bad"])
@pytest.mark.parametrize("path", SCORING)
def test_generated_requests_to_a_classifier(scoring_api: Api, path: str, mode: Any) -> None:
    fuzz(scoring_api, path, mode, FEW_SEED, 10)


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/score", {"text_1": "a", "text_2": ["b", "c"], "user": "me"}),
        ("/v1/rerank", {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1, "model": "fake"}),
        ("/rerank", {"query": "a", "documents": ["b"], "return_documents": False, "truncation": False}),
    ],
)
def test_good_requests_to_a_classifier(scoring_api: Api, path: str, body: dict[str, Any]) -> None:
    case = scoring_api.schema[path]["post"].Case(body=body, media_type="application/json")
    assert scoring_api.send(case).status_code == 200


@pytest.mark.parametrize("path", GETS)
def test_requests_without_a_body(api: Api, path: str) -> None:
    assert api.send(api.schema[path]["get"].Case()).status_code == 200


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", {"prompt": "abc", "echo": True, "logprobs": 2, "return_token_ids": True}),
        ("/v1/completions", {"prompt": ["abc", "d"], "n": 2, "prompt_logprobs": 1, "user": "me", "suffix": ""}),
        ("/v1/completions", {"prompt": [[1, 2], [3]], "stream": True, "stream_options": USAGE, "logprobs": 1}),
        ("/v1/chat/completions", {"messages": TALK, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 0}),
        (
            "/v1/chat/completions",
            {"messages": TALK, "stream": True, "n": 2, "logprobs": True, "priority": -1},
        ),
        ("/v1/chat/completions", {"messages": TALK, "stream": True, "stream_options": USAGE, "model": "fake"}),
        ("/v1/embeddings", {"input": ["abc", "d"], "dimensions": 2, "encoding_format": "base64"}),
        ("/v1/embeddings", {"input": [[1, 2], [3]], "pooling": "mean", "normalize": False, "user": "me"}),
        ("/tokenize", {"messages": TALK, "chat_template_kwargs": {"self": 1, "a b": []}, "return_token_strs": True}),
        ("/detokenize", {"tokens": [65, 66]}),
        ("/admin/sleep", {"level": 1, "timeout_s": 0.5}),
    ],
)
def test_good_requests(api: Api, path: str, body: dict[str, Any]) -> None:
    """Every shape of an answer, that of events too, is checked against the schema."""
    case = api.schema[path]["post"].Case(body=body, media_type="application/json")
    assert api.send(case).status_code == 200


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_tiny(tmp_path_factory.mktemp("served"), SEED)
    flags = [str(folder), "--served-model-name", "tiny", "--max-n", "2", "--max-choices", "4"]
    with started("tokenspeed.cli.main", ["serve", "--port", "0", *flags]) as server:
        server.wait_until_ready()
        yield server
        assert server.get("/health").status_code == 200
        assert server.terminate() == 0, server.log
        assert not [line for line in server.log if "Traceback" in line]


def fuzz_process(server: ServerProcess, path: str, mode: Any, seed: int, examples: int) -> None:
    api = Api(server.url, "tiny", VOCAB)
    fuzz(api, path, mode, seed, examples)
    api.close()


@pytest.mark.parametrize("mode", [GOOD, BAD], ids=["good", "bad"])
def test_a_whole_server(tiny: ServerProcess, mode: Any) -> None:
    fuzz_process(tiny, "/v1/completions", mode, FEW_SEED, 20)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GOOD, BAD], ids=["good", "bad"])
@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/score", "/rerank", "/tokenize", "/detokenize"],
)
def test_a_whole_server_at_length(tiny: ServerProcess, path: str, mode: Any) -> None:
    fuzz_process(tiny, path, mode, SEED, 300)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GOOD, BAD], ids=["good", "bad"])
@pytest.mark.parametrize("path", POSTS)
def test_many_generated_requests(api: Api, path: str, mode: Any) -> None:
    fuzz(api, path, mode, SEED, 200)


def test_what_it_would_find(serve: Serve) -> None:
    """The net is tight: an answer outside the schema, and a bug, are failures."""
    served = serve()
    made = Api(served.url, "fake", VOCAB_SIZE)
    served.engine.info = msgspec.structs.replace(served.engine.info, max_model_len="long")
    with pytest.raises(BaseExceptionGroup, match="violates schema"):
        made.send(made.schema["/v1/models"]["get"].Case())
    served.engine.submit = None  # type: ignore[assignment,method-assign]
    case = made.schema["/v1/completions"]["post"].Case(body={"prompt": "x"}, media_type="application/json")
    with pytest.raises(BaseExceptionGroup, match="500"):
        made.send(case)
    made.close()
