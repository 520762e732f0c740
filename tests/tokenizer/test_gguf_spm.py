from __future__ import annotations

import hashlib
import importlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.seeds import SEED
from tokenspeed.config.demo import demo_model_path
from tokenspeed.contracts.errors import FormatError, PromptError, UnsupportedError
from tokenspeed.formats.gguf import open_gguf
from tokenspeed.tokenizer.base import Tokenizer
from tokenspeed.tokenizer.gguf import tokenizer_from_gguf
from tokenspeed.tokenizer.spm import SpecialSplitter, SpmVocabulary, model_proto

ROOT = Path(__file__).parents[2]
GREEDY = ROOT / "tests" / "data" / "gemma3-270m-greedy.json"
GREEDY_SHA256 = "9b2281a175f183bb35685f35bc5e13457321c3cd7e84fafb4313c1e300247bee"
SEEDS = [SEED + i for i in range(3)]
SAMPLES = [
    "The quick brown fox, naïve and 12,345 years old.",
    "日本語のテキスト und Übergrößenträger — “quotes”…",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 \U0001f9ff rare: 𒀀𓀀 \x00\x01 \u0378",
    "def f(x):\n\treturn   x\n\n\n# end    \n",
    "  leading and trailing  ",
    "<html><b>a<b</b> <unused1",
]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return tokenizer_from_gguf(open_gguf(demo_model_path()).metadata)


@pytest.fixture(scope="module")
def greedy() -> list[dict[str, Any]]:
    return json.loads(GREEDY.read_bytes())["items"]


def test_reference_file_is_the_pinned_one() -> None:
    assert hashlib.sha256(GREEDY.read_bytes()).hexdigest() == GREEDY_SHA256


@pytest.mark.parametrize("index", range(5))
def test_demo_ids_and_text_are_those_of_transformers(demo: Tokenizer, greedy: list[dict], index: int) -> None:
    item = greedy[index]
    assert len(greedy) == 5
    assert demo.encode(item["prompt"]) == item["prompt_ids"]
    assert demo.encode(item["prompt"], add_special_tokens=False) == item["prompt_ids"][1:]
    assert demo.decode(item["prompt_ids"]) == item["prompt"]
    assert demo.decode(item["greedy_ids"]) == item["text"]
    detokenizer = demo.detokenizer(item["prompt_ids"])
    assert "".join(detokenizer.push([i]) for i in item["greedy_ids"]) + detokenizer.finish() == item["text"]


def test_demo_facts(demo: Tokenizer) -> None:
    assert demo.vocab_size == 262144
    assert demo.bos_token_id == 2
    assert list(demo.eos_token_ids) == [1]
    assert demo.special_tokens["bos_token"] == "<bos>"
    assert demo.special_tokens["eos_token"] == "<eos>"
    assert demo.chat_template is None
    assert demo.token_text(5279) == " capital"
    assert demo.token_text(106) == "<end_of_turn>"


def test_special_tokens_in_text_are_recognised(demo: Tokenizer) -> None:
    ids = demo.encode("<bos><start_of_turn>user\nhi<end_of_turn>\n", add_special_tokens=False)
    assert ids == [2, 105, 2364, 107, 2202, 106, 107]
    assert demo.decode(ids) == "user\nhi\n"
    assert demo.decode(ids, skip_special_tokens=False) == "<bos><start_of_turn>user\nhi<end_of_turn>\n"


def test_runs_of_spaces_and_newlines_are_single_user_defined_tokens(demo: Tokenizer) -> None:
    assert demo.encode("\n" * 5 + "x" + " " * 4, add_special_tokens=False) == [111, 236781, 140]
    assert len(demo.encode(" " * 40, add_special_tokens=False)) == 2


@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives_encoding_and_decoding(demo: Tokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text)) == text


@pytest.mark.parametrize("seed", SEEDS)
def test_random_ids_decode_the_same_in_any_cuts(demo: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    for size in (1, 5, 333):
        ids = [rng.choice((rng.randrange(262144), rng.randrange(238, 494), rng.randrange(7))) for _ in range(size)]
        for skip in (True, False):
            detokenizer, text, at = demo.detokenizer((), skip), "", 0
            while at < size:
                step = rng.randint(1, 9)
                text += detokenizer.push(ids[at : at + step])
                at += step
            assert text + detokenizer.finish() == demo.decode(ids, skip)


def test_the_room_imports_without_torch_or_the_tokenizer_libraries() -> None:
    code = (
        "import sys, tokenspeed.tokenizer.load, tokenspeed.tokenizer.chat;"
        "print([m for m in ('torch', 'transformers', 'sentencepiece', 'tokenizers', 'jinja2', 'google.protobuf',"
        " 'huggingface_hub', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_lone_surrogate_is_refused(demo: Tokenizer) -> None:
    with pytest.raises(PromptError, match="surrogate at character 2"):
        demo.encode("ab\ud800c")


# A trained model with a dummy prefix, as Llama 2 has it; sentencepiece on the original model is the oracle.


@pytest.fixture(scope="module")
def trained() -> Any:
    import sentencepiece

    words = ["hello", "world", "naïve", "日本", "tokens", "speed", "of", "light", "memory"]
    rng = random.Random(7)
    lines = [" ".join(rng.choice(words) for _ in range(8)) for _ in range(400)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def metadata_of(processor: Any, **changes: Any) -> dict[str, Any]:
    ids = range(processor.GetPieceSize())
    kinds = [(processor.IsUnknown, 2), (processor.IsControl, 3), (processor.IsByte, 6)]
    types = [next((kind for test, kind in kinds if test(i)), 1) for i in ids]
    types[processor.PieceToId("<tool>")] = 4
    fields = {
        "model": "llama",
        "tokens": [processor.IdToPiece(i) for i in ids],
        "scores": [processor.GetScore(i) for i in ids],
        "token_type": types,
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize("text", [*SAMPLES, "hello world", " hello", "worldspeed oflight", "a<tool> hello", "", "▁x"])
def test_ids_and_text_are_those_of_the_original_sentencepiece_model(trained: Any, text: str) -> None:
    tokenizer = tokenizer_from_gguf(metadata_of(trained))
    ids = trained.EncodeAsIds(text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode(text) == [1, *ids]
    assert tokenizer.decode(ids) == trained.DecodeIds(ids)


def test_each_part_between_special_tokens_is_a_text_of_its_own(trained: Any) -> None:
    tokenizer = tokenizer_from_gguf(metadata_of(trained))
    hello, world = trained.EncodeAsIds("hello"), trained.EncodeAsIds("world")
    assert tokenizer.encode("<s>hello</s>world") == [1, 1, *hello, 2, *world]


def test_added_bos_and_eos_follow_the_file(trained: Any) -> None:
    hello = trained.EncodeAsIds("hello")
    both = tokenizer_from_gguf(metadata_of(trained, add_eos_token=True))
    none = tokenizer_from_gguf(metadata_of(trained, add_bos_token=False))
    assert both.encode("hello") == [1, *hello, 2]
    assert none.encode("hello") == hello


def test_ends_of_a_turn_end_a_generation(trained: Any) -> None:
    tokenizer = tokenizer_from_gguf(metadata_of(trained, eot_token_id=5, eom_token_id=2))
    assert list(tokenizer.eos_token_ids) == [2, 5]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"model": "bert"}, UnsupportedError, "'bert'.*llama.*gpt2"),
        ({"model": "t5"}, UnsupportedError, "'t5'"),
        ({"model": None}, FormatError, "no tokenizer.ggml.model"),
        ({"tokens": None}, FormatError, "no tokenizer.ggml.tokens"),
        ({"tokens": []}, FormatError, "empty"),
        ({"scores": None}, FormatError, "no tokenizer.ggml.scores"),
        ({"scores": [0.0]}, FormatError, "scores has 1 entries for 330"),
        ({"token_type": [1] * 329}, FormatError, "token_type has 329 entries"),
        ({"token_type": [1] * 329 + [0]}, FormatError, r"type is 0 \(known: 1 to 6\)"),
        ({"token_type": [-3] + [1] * 329}, FormatError, r"type is -3"),
        ({"token_type": [1] * 200 + [300] * 130}, FormatError, r"type is 300"),
        ({"bos_token_id": 330}, FormatError, "bos_token_id is 330"),
        ({"bos_token_id": "<s>"}, FormatError, "bos_token_id is '<s>'"),
        ({"eos_token_id": 1000}, FormatError, "1000"),
        ({"tokens": ["same"] * 330}, FormatError, "cannot load"),
        ({"tokens": ["<0xZZ>"] * 330}, FormatError, "cannot load"),
        ({"bos_token_id": None, "add_bos_token": True}, FormatError, "bos_token_id is missing"),
    ],
)
def test_broken_vocabularies_are_refused(trained: Any, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        tokenizer_from_gguf(metadata_of(trained, **changes))


@pytest.mark.parametrize("nul", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_model_is_the_one_that_protobuf_writes(seed: int, nul: bool) -> None:
    """Pieces of any length and content, and a vocabulary of one."""
    schema: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    rng = random.Random(f"{seed} {nul}")
    for count in (1, 2, 500):
        letters = "ab 日é😀\n" + "\0" * nul
        pieces = ["".join(rng.choices(letters, k=rng.choice((0, 1, 5, 43, 44, 200, 20_000)))) for _ in range(count)]
        scores = [rng.uniform(-1e4, 1e4) for _ in pieces]
        types = [rng.randint(1, 6) for _ in pieces]
        unk_id = rng.randrange(count)
        found = schema.ModelProto.FromString(model_proto(SpmVocabulary(pieces, scores, types, unk_id, seed % 2 == 0)))
        expected = schema.ModelProto()
        for piece, score, kind in zip(pieces, scores, types, strict=True):
            expected.pieces.add(piece=piece.replace(" ", "▁"), score=score, type=kind)
        expected.pieces[unk_id].type = schema.ModelProto.SentencePiece.UNKNOWN
        trainer = expected.trainer_spec
        trainer.model_type, trainer.unk_id, trainer.vocab_size = schema.TrainerSpec.BPE, unk_id, count
        trainer.byte_fallback = 6 in types
        normalizer = expected.normalizer_spec
        normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
        normalizer.add_dummy_prefix = seed % 2 == 0
        assert found == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_splitter_agrees_with_a_regex_of_all_tokens(seed: int) -> None:
    import re

    rng = random.Random(seed)
    tokens = {"".join(rng.choice("<>a]^") for _ in range(rng.randint(1, 5))) for _ in range(30)}
    ids = {token: i for i, token in enumerate(sorted(tokens))}
    pattern = re.compile("(" + "|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) + ")")
    for size in (0, 1, 7, 200):
        text = "".join(rng.choice("<>a]^bc ") for _ in range(size))
        expected = [ids.get(part, part) for part in pattern.split(text) if part]
        assert list(SpecialSplitter(ids).split(text)) == expected


def test_splitter_without_tokens_leaves_the_text() -> None:
    assert list(SpecialSplitter({}).split("a<b>")) == ["a<b>"]
