"""`LLM`: the engine in this process, with the names and result shapes of vLLM's offline API."""

from __future__ import annotations

import gc
import itertools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from numbers import Integral
from typing import Any

import msgspec

from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import LogitsProcessorError, ParameterError, PromptError
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.intake import Intake, open_tokenizer
from tokenspeed.engine.output import OutputBuilder, RequestOutput
from tokenspeed.engine.pooling import (
    ClassificationOutput,
    EmbeddingOutput,
    PooledOutput,
    ScoringOutput,
    embedding_of,
    embedding_pooling,
    pooled_of,
    probabilities,
)
from tokenspeed.engine.scoring import Scorer, paired
from tokenspeed.engine.sleep import wakes_cache
from tokenspeed.runner.build import ModelFiles, open_model
from tokenspeed.tokenizer.base import Tokenizer

logger = logging.getLogger("tokenspeed")
Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; with both keys, the ids count."""


class LLM:
    """A model ready to generate. Keywords are the fields of EngineConfig; `model` None is the demo model."""

    def __init__(
        self, model: str | None = None, *, progress: Callable[[int, int], None] | None = None, **settings: Any
    ) -> None:
        """Raises the errors of `contracts.errors`: an unknown setting, no such model, a broken file, too little
        memory."""
        self.config = EngineConfig.from_kwargs({"model": model} | settings)
        files = open_model(self.config)
        self.generation = files.generation
        _warn_unsupported(files)
        with ThreadPoolExecutor(1) as pool:  # beside the weights, whose unpacking leaves the interpreter free
            tokenizer = pool.submit(_load_tokenizer, files)
            self.core = EngineCore(self.config, files, progress)
            self._tokenizer = tokenizer.result()
        self._info = self.core.info
        self._intake = Intake(self._info, self._tokenizer, self.config.seed)
        self._numbers = itertools.count()
        self._unfinished: dict[str, OutputBuilder] = {}
        self._failed: dict[str, LogitsProcessorError] = {}
        """By request id, until it is raised."""

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises PromptError for a model that has none (random weights of a shipped config)."""
        if self._tokenizer is None:
            raise PromptError("this model has no tokenizer: give prompt_token_ids")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams with the defaults the checkpoint states."""
        return SamplingParams.from_dict(dict(self.generation.sampling))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; results in their order. One SamplingParams serves all, or give one for each.

        Every prompt is checked before any is run. Raises PromptError, ParameterError, MemoryLimitError,
        EngineAsleepError; LogitsProcessorError once all others are done, whose results it holds.
        """
        listed = _prompt_list(prompts, prompt_token_ids)
        with _heap_spared():
            return self._finish(self._submit(listed, self._params_list(sampling_params, len(listed))), use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        use_tqdm: bool = True,
    ) -> list[PooledOutput[EmbeddingOutput]]:
        """A vector of each prompt: the hidden state after the final norm of its last token or the mean of all ("mean"),
        then its first `dimensions` numbers, then divided by its length. Means do not read the prefix cache.

        Raises ParameterError, PromptError, MemoryLimitError, EngineAsleepError.
        """
        asked = embedding_pooling(pooling, dimensions, self._info.hidden_size)
        outputs = self._pool(_one_or_many(prompts), asked, use_tqdm)
        made = [embedding_of(output, normalize, dimensions).tolist() for output in outputs]
        return [PooledOutput.of(output, EmbeddingOutput(each)) for output, each in zip(outputs, made, strict=True)]

    def score(
        self,
        query: str | Sequence[str],
        documents: str | Sequence[str],
        instruction: str | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[PooledOutput[ScoringOutput]]:
        """How well each document answers the query, or the query at its place, from 0 to 1: by a language model the
        probability of "yes" against "no" after Qwen3-Reranker's template, by a classification head of one label the
        logistic function of its logit. instruction: what counts as an answer, in the template.

        Raises ParameterError, for a model that is neither too; otherwise as `embed` does.
        """
        tokenizer = self.get_tokenizer()
        scorer = Scorer(tokenizer, self._info, instruction)
        pieces = [scorer.pieces(*pair) for pair in paired(query, documents)]
        prompts = [[token for text, special in each for token in tokenizer.encode(text, special)] for each in pieces]
        outputs = self._pool(prompts, scorer.pooling, use_tqdm)
        return [PooledOutput.of(each, ScoringOutput(probabilities(pooled_of(each))[0])) for each in outputs]

    def classify(
        self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True
    ) -> list[PooledOutput[ClassificationOutput]]:
        """The probability of each label of a classification head: softmax, of a lone one the logistic function.

        Raises ParameterError for a language model; otherwise as `embed` does.
        """
        outputs = self._pool(_one_or_many(prompts), Pooling("score"), use_tqdm)
        return [PooledOutput.of(each, ClassificationOutput(probabilities(pooled_of(each)))) for each in outputs]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[tuple[str, RequestOutput]]:
        """Complete one prompt, giving each new piece of text and the output so far; raises at once, as `generate` does,
        but for LogitsProcessorError, which comes at the end of this stream alone.

        Dropping the iterator aborts the request. Several may be read in turns: their requests share the steps.
        """
        (builder,) = self._submit([prompt], self._params_list(sampling_params, 1))
        pieces = self._pieces(builder)
        next(pieces)  # A generator that never started would not clean up when it is dropped.
        return pieces

    def sleep(self, level: int = 1) -> None:
        """Give back the memory of the KV cache and forget its prefixes. Weights stay, and so do captured graphs. Until
        `wake_up`, prompts are refused with EngineAsleepError. Nothing new where it sleeps.

        Raises UnsupportedError for level 2, which would drop the weights, and where a device has no way;
        EngineBusyError while a stream is half read: finish it or drop it; DeviceError.
        """
        self.core.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take the memory again. tags: of "weights" and "kv_cache", what to wake, by default both; weights never sleep,
        so alone they change nothing.

        Raises ParameterError for another tag; MemoryLimitError where others have the memory by now; it goes on
        sleeping.
        """
        if wakes_cache(tags) and self.core.asleep:
            self.core.wake()

    def is_sleeping(self) -> bool:
        """Whether `wake_up` has to come before the next prompt."""
        return self.core.asleep

    def close(self) -> None:
        """Release the model. Prompts are refused with EngineClosedError afterwards."""
        self.core.close()

    def _pool(self, prompts: Sequence[Prompt], pooling: Pooling, use_tqdm: bool) -> list[RequestOutput]:
        with _heap_spared():
            return self._finish(self._submit(prompts, [pooling] * len(prompts)), use_tqdm)

    def _finish(self, builders: list[OutputBuilder], use_tqdm: bool) -> list[RequestOutput]:
        outputs = [builder.output for builder in builders]
        with self._abort_unfinished(builders), _progress_bar(len(outputs), use_tqdm) as bar:
            while (done := sum(output.finished for output in outputs)) < len(outputs):
                bar.update(done - bar.n)
                self._step()
            bar.update(done - bar.n)
            self._raise_failure(outputs)
        return outputs

    def _pieces(self, builder: OutputBuilder) -> Iterator[tuple[str, RequestOutput]]:
        output, completion = builder.output, builder.output.outputs[0]
        num_tokens = shown = 0
        with self._abort_unfinished([builder]):
            yield "", output
            done = False
            while not done:
                while not output.finished and len(completion.token_ids) == num_tokens:
                    self._step()
                done, num_tokens = output.finished, len(completion.token_ids)
                text = completion.text[shown:]
                shown += len(text)
                yield text, output
            self._raise_failure([output])

    def _step(self) -> None:
        try:
            updates = self.core.step()
        except BaseException:
            self._abort(list(self._unfinished.values()))
            raise
        for request_id, failure in self.core.failed:
            self._fail(request_id, failure)
        for update in updates:
            builder = self._unfinished.get(update.request_id)
            if builder is None:
                continue
            if builder.update(update).abort:
                self.core.abort(update.request_id, update.index)
            if builder.output.finished:
                del self._unfinished[update.request_id]

    def _fail(self, request_id: str, error: LogitsProcessorError) -> None:
        builder = self._unfinished.pop(request_id, None)
        if builder is not None:
            self._failed[request_id] = error
            for update in builder.abort_updates():
                builder.update(msgspec.structs.replace(update, finish_reason="error"))

    def _raise_failure(self, outputs: list[RequestOutput]) -> None:
        """Raise the first of the errors that ended these."""
        for output in outputs:
            if output.request_id in self._failed:
                error = self._failed[output.request_id]
                error.outputs = outputs
                raise error

    @contextmanager
    def _abort_unfinished(self, builders: list[OutputBuilder]) -> Iterator[None]:
        try:
            yield
        finally:
            self._abort(builders)
            for builder in builders:
                self._failed.pop(builder.output.request_id, None)

    def _abort(self, builders: list[OutputBuilder]) -> None:
        for builder in builders:
            request_id = builder.output.request_id
            if self._unfinished.pop(request_id, None):
                self.core.abort(request_id)
                for update in builder.abort_updates():
                    builder.update(update)

    def _submit(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams] | Sequence[Pooling]
    ) -> list[OutputBuilder]:
        wanted: Sequence[SamplingParams | Pooling] = params
        made = [self._request(prompt, each) for prompt, each in zip(prompts, wanted, strict=True)]
        builders = [OutputBuilder(request, text, self._tokenizer) for request, text in made]
        added: list[str] = []
        try:
            for request, _ in made:
                self.core.add(request)
                added.append(request.request_id)
        except Exception:
            for request_id in added:
                self.core.abort(request_id)
            raise
        self._unfinished |= {builder.output.request_id: builder for builder in builders}
        return builders

    def _params_list(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, list | tuple) or not all(isinstance(each, SamplingParams) for each in given):
            raise ParameterError(f"sampling_params must be one SamplingParams or a list of them, got {given!r:.80}")
        if len(given) != count:
            raise ParameterError(f"{len(given)} sampling_params for {count} prompts")
        return given

    def _request(self, prompt: Prompt, params: SamplingParams | Pooling) -> tuple[Request, str | None]:
        text, ids = _read_prompt(prompt)
        if ids is None:
            self.get_tokenizer()
        given = ids if ids is not None else text or ""
        return self._intake.request(str(next(self._numbers)), given, params, priority=0, cache_salt=""), text


def _warn_unsupported(files: ModelFiles) -> None:
    if files.generation.unsupported:
        wanted = ", ".join(f"{name} {value}" for name, value in files.generation.unsupported.items())
        logger.warning("%s: its sampling defaults ask for %s, which is not supported and left out", files.name, wanted)


def _load_tokenizer(files: ModelFiles) -> Tokenizer | None:
    source = files.tokenizer
    return None if source is None else open_tokenizer(str(source.path), source.format, source.name)


def _prompt_list(prompts: Any, prompt_token_ids: Any) -> list[Prompt]:
    if (prompts is None) == (prompt_token_ids is None):
        raise ParameterError("give either prompts or prompt_token_ids")
    if prompts is None:
        return [{"prompt_token_ids": ids} for ids in _one_or_many(prompt_token_ids)]
    return _one_or_many(prompts)


def _one_or_many(given: Any) -> list[Any]:
    """A list of prompts from one prompt or several: a list of ints is one."""
    if isinstance(given, str | Mapping):
        return [given]
    try:
        items = list(given)
    except TypeError:
        raise _no_prompt(given) from None
    return [items] if items and isinstance(items[0], Integral) else items


def _read_prompt(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    if isinstance(prompt, Mapping):
        unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids"})
        if unknown or len(prompt) == 0:
            raise ParameterError(
                f"a prompt has the keys prompt or prompt_token_ids, got: {', '.join(unknown) or 'none'}"
            )
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if ids is None and not isinstance(text, str):
        raise _no_prompt(prompt)
    if ids is None and not text:
        raise PromptError("the prompt is empty")
    return text, None if ids is None else _token_ids(ids)


def _token_ids(given: Any) -> list[int]:
    try:
        return list(map(operator.index, given))
    except TypeError:
        raise _no_prompt(given) from None


def _no_prompt(given: Any) -> PromptError:
    return PromptError(f"a prompt is text, a list of token ids, or a dict of either; got {given!r:.80}")


@contextmanager
def _heap_spared() -> Iterator[None]:
    """Meanwhile the collector leaves alone what is there: to walk a loaded model and its libraries takes 100 ms."""
    if gc.get_freeze_count():  # the caller has done so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _NoBar:
    """In place of a progress bar."""

    n = 0

    def update(self, done: int) -> None:
        pass


def _progress_bar(total: int, shown: bool) -> Any:
    if not shown:
        return nullcontext(_NoBar())  # tqdm is not needed then
    from tqdm import tqdm

    return tqdm(total=total, desc="generating", unit="req", dynamic_ncols=True)
