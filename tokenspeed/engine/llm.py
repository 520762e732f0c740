"""`LLM`: the engine in this process, with the names and result shapes of vLLM's offline API."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ModelNotFoundError, ParameterError, PromptError
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.output import OutputBuilder, RequestOutput
from tokenspeed.runner.build import ModelFiles, open_model
from tokenspeed.tokenizer.base import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} or {"prompt_token_ids": ids}."""


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
        self._tokenizer = _load_tokenizer(files)
        self.core = EngineCore(self.config, files, progress)
        self._numbers = itertools.count()
        self._seeds = _seeds(self.config.seed)

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

        Every prompt is checked before any is run. Raises PromptError, ParameterError, MemoryLimitError.
        """
        builders = self._submit(_prompt_list(prompts, prompt_token_ids), sampling_params)
        with _progress_bar(len(builders), use_tqdm) as bar:
            for _ in self._run(builders, bar.update):
                pass
        return [builder.output for builder in builders.values()]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[tuple[str, RequestOutput]]:
        """Complete one prompt, giving each new piece of text and the output so far."""
        return self._run(self._submit([prompt], sampling_params))

    def close(self) -> None:
        """Release the model."""
        self.core.close()

    def _run(
        self, builders: dict[str, OutputBuilder], on_finished: Callable[[], Any] | None = None
    ) -> Iterator[tuple[str, RequestOutput]]:
        try:
            while self.core.has_work:
                for update in self.core.step():
                    builder = builders[update.request_id]
                    text = builder.update(update)
                    yield text, builder.output
                    if builder.output.finished and on_finished is not None:
                        on_finished()
        finally:
            for request_id, builder in builders.items():
                if not builder.output.finished:
                    self.core.abort(request_id)

    def _submit(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> dict[str, OutputBuilder]:
        params = self._params_list(sampling_params, len(prompts))
        made = [self._request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        added: list[str] = []
        try:
            for request, _ in made:
                self.core.add(request)
                added.append(request.request_id)
        except Exception:
            for request_id in added:
                self.core.abort(request_id)
            raise
        return {request.request_id: OutputBuilder(request, text, self._tokenizer) for request, text in made}

    def _params_list(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise ParameterError(f"{len(given)} sampling_params for {count} prompts")
        return given

    def _request(self, prompt: Prompt, params: SamplingParams) -> tuple[Request, str | None]:
        text, ids = _read_prompt(prompt)
        if ids is None:
            ids = self.get_tokenizer().encode(text or "")
        seed = params.seed if params.seed is not None else next(self._seeds)
        request = Request(
            request_id=str(next(self._numbers)),
            prompt_token_ids=ids,
            params=params,
            seed=seed % 2**64,
            eos_token_ids=self._eos_token_ids(),
        )
        return request, text

    def _eos_token_ids(self) -> list[int]:
        known = self._tokenizer.eos_token_ids if self._tokenizer else ()
        return list(dict.fromkeys([*self.generation.eos_token_ids, *known]))


def _load_tokenizer(files: ModelFiles) -> Tokenizer | None:
    """The model's tokenizer, or None for a model without one: it then takes and gives ids alone."""
    if files.source is None or (files.metadata is not None and "tokenizer.ggml.model" not in files.metadata):
        return None
    from tokenspeed.tokenizer.load import load_tokenizer

    try:
        return load_tokenizer(files.source, files.metadata)
    except ModelNotFoundError:
        return None


def _seeds(seed: int | None) -> Iterator[int]:
    """Seeds of requests that name none: fresh ones, or a sequence that `seed` repeats."""
    if seed is None:
        while True:
            yield secrets.randbits(64)
    for number in itertools.count():
        yield (seed * 0x9E3779B97F4A7C15 + number) % 2**64


def _prompt_list(prompts: Any, prompt_token_ids: Any) -> list[Prompt]:
    if (prompts is None) == (prompt_token_ids is None):
        raise ParameterError("give either prompts or prompt_token_ids")
    given = prompts if prompts is not None else prompt_token_ids
    if isinstance(given, str | Mapping) or (len(given) > 0 and isinstance(given[0], int)):
        return [given]
    return list(given)


def _read_prompt(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is empty")
        return prompt, None
    if isinstance(prompt, Mapping):
        unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids"})
        if unknown or len(prompt) == 0:
            raise ParameterError(
                f"a prompt has the keys prompt or prompt_token_ids, got: {', '.join(unknown) or 'none'}"
            )
        ids = prompt.get("prompt_token_ids")
        return prompt.get("prompt"), None if ids is None else list(ids)
    return None, list(prompt)


def _progress_bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="generating", unit="req", disable=not shown, dynamic_ncols=True)
