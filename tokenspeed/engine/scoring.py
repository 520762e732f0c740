"""Prompts that ask a model how well a document answers a query. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from tokenspeed.contracts.errors import ParameterError
from tokenspeed.contracts.step import Pooling
from tokenspeed.engine.messages import ModelHead
from tokenspeed.tokenizer.base import Tokenizer

Piece = tuple[str, bool]
"""A text, and whether the tokens that the model was trained with (bos, eos) are added to its ids."""
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
ANSWERS = ("yes", "no")
"""A reranker's score is the probability of the first against the second as its next token."""
BEGIN = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Source of these texts: the model card of Qwen3-Reranker, https://huggingface.co/Qwen/Qwen3-Reranker-0.6B."""
MARKS = ("<|im_start|>", "<|im_end|>")


class Scorer:
    """How one model is asked: a language model by Qwen3-Reranker's template, a classification head of one label by the
    query and the document as a tokenizer joins two texts, each with its own bos."""

    def __init__(self, tokenizer: Tokenizer, head: ModelHead, instruction: str | None) -> None:
        """Raises ParameterError where the model cannot score, and for an instruction that it would not see."""
        self._instruction = instruction if instruction is not None else DEFAULT_INSTRUCTION
        self._classifies = head.num_labels > 0
        if head.num_labels > 1:
            raise ParameterError(
                f"model: {head.model} has {head.num_labels} labels; a score is made of one: classify with it instead"
            )
        if self._classifies and instruction is not None:
            raise ParameterError(f"instruction: {head.model} has a classification head and no template to put it in")
        ids = [] if self._classifies else [_one_token(text, tokenizer, head.model) for text in (*ANSWERS, *MARKS)]
        self.pooling = Pooling("score", token_ids=ids[: len(ANSWERS)])

    def pieces(self, query: str, document: str) -> list[Piece]:
        """Texts whose ids, one after the other, are the prompt."""
        if self._classifies:
            return [(query, True), (document, True)]
        body = f"<Instruct>: {self._instruction}\n<Query>: {query}\n<Document>: {document}"
        return [(BEGIN, False), (body, False), (END, False)]


def paired(
    first: str | Sequence[str], second: str | Sequence[str], names: tuple[str, str] = ("query", "documents")
) -> list[tuple[str, str]]:
    """Each of `first` with the one of `second` at its place, or a lone one with all. Raises ParameterError."""
    left, right = ([given] if isinstance(given, str) else list(given) for given in (first, second))
    for name, texts in zip(names, (left, right), strict=True):
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ParameterError(f"{name} must be a text, or a list of texts that is not empty")
    if len(left) == 1:
        left *= len(right)
    if len(left) != len(right):
        raise ParameterError(f"{names[0]}: {len(left)} texts do not go with {len(right)} of {names[1]}")
    return list(zip(left, right, strict=True))


def _one_token(text: str, tokenizer: Tokenizer, model: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ParameterError(
            f"model: {model} is no reranker: its tokenizer splits {text!r} into {len(ids)} tokens, and the template of "
            "Qwen3-Reranker needs it in one"
        )
    return ids[0]
