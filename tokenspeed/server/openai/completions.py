"""/v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence

from msgspec import UNSET
from starlette.responses import Response

from tokenspeed.engine.output import CompletionOutput, TokenAlternatives
from tokenspeed.server.direct import TextWriter
from tokenspeed.server.engine import Info
from tokenspeed.server.generation import Generation
from tokenspeed.server.limits import check_params
from tokenspeed.server.openai.gather import UsageCount, gather
from tokenspeed.server.openai.logprobs import completion_logprobs
from tokenspeed.server.openai.prompts import check_length, plain_prompts
from tokenspeed.server.openai.requests import CompletionRequest, decode_completion
from tokenspeed.server.openai.responses import Completion, CompletionChoice
from tokenspeed.server.openai.sampling import completion_params
from tokenspeed.server.sse import event, event_reply, json_reply, text_writer
from tokenspeed.server.state import ServerState
from tokenspeed.tokenizer.base import Tokenizer

Alternatives = Sequence[TokenAlternatives | None]


async def complete(state: ServerState, body: bytes) -> Response:
    """Answer a request. Raises ApiError and the errors of `contracts.errors` for one that is refused."""
    request = decode_completion(body)
    engine = state.ready(request.model)
    state.admission.check(engine)
    params = completion_params(request, engine.info.sampling_defaults)
    check_params(request.stop, params, state.limits)
    prompts = await plain_prompts(request.prompt, params.n, state)
    check_length(prompts, engine, "prompt")
    choices = _Choices(request, prompts, _echoes(request, prompts, state), params.n, engine.tokenizer)
    head = Completion(
        id=f"cmpl-{secrets.token_hex(12)}", created=int(time.time()), model=request.model or state.names[0], choices=[]
    )
    generation = Generation(
        engine,
        state.metrics,
        state.admission,
        prompts,
        params,
        request_id=head.id,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
    )
    if not request.stream:
        return json_reply(_whole(head, generation, choices, engine.info))
    count = UsageCount(generation)

    def example(text: str) -> bytes:
        head.choices = [choices.make(0, CompletionOutput(0, [text]), ())]
        return event(head)

    def push(writer: TextWriter) -> None:
        if choices.shows_samples and not request.return_token_ids and request.logprobs is None:
            generation.push(text_writer(writer, example))

    return event_reply(_events(request, head, generation, choices, engine.info, count), push)


def _echoes(request: CompletionRequest, prompts: Sequence[list[int]], state: ServerState) -> list[str]:
    """What to say of each prompt before its completion."""
    if not request.echo:
        return [""] * len(prompts)
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if all(isinstance(text, str) for text in given):
        return [text for text in given if isinstance(text, str)]
    return [state.tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts]


async def _whole(head: Completion, generation: Generation, choices: _Choices, info: Info) -> Completion:
    outputs, count = await gather(generation)
    head.choices = [
        choices.make(number, sample, output.prompt_logprobs or ())
        for number, output in enumerate(outputs)
        for sample in output.outputs
    ]
    head.usage, head.timings = count.usage(samples_shown=choices.shows_samples), count.timings(info)
    return head


async def _events(
    request: CompletionRequest,
    head: Completion,
    generation: Generation,
    choices: _Choices,
    info: Info,
    count: UsageCount,
) -> AsyncGenerator[bytes, None]:
    head.usage = None if request.include_usage else UNSET
    prompt_logprobs: dict[int, list[TokenAlternatives | None]] = {}
    with generation:
        async for number, output in generation.outputs():
            count.add(number, output)
            if output.prompt_logprobs:
                prompt_logprobs.setdefault(number, []).extend(output.prompt_logprobs)
            for new in output.outputs:
                if new.token_ids or new.finish_reason:
                    head.choices = [choices.make(number, new, prompt_logprobs.get(number, ()))]
                    if count.complete and new is output.outputs[-1] and not request.include_usage:
                        head.timings = count.timings(info)
                    yield event(head)
    if request.include_usage:
        head.choices, head.usage = [], count.usage(samples_shown=choices.shows_samples)
        head.timings = count.timings(info)
        yield event(head)


class _Choices:
    """Makes the choices of a response, or of its events one after the other."""

    def __init__(
        self,
        request: CompletionRequest,
        prompts: Sequence[list[int]],
        echoes: Sequence[str],
        n: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._request, self._prompts, self._echoes, self._n = request, prompts, echoes, n
        self._tokenizer = tokenizer
        self._offsets: dict[int, int] = {}
        self.shows_samples = request.max_tokens != 0

    def make(self, number: int, new: CompletionOutput, prompt_logprobs: Alternatives) -> CompletionChoice:
        """What is new of a sample of prompt `number`; with the prompt, where it is echoed and this is the first."""
        index = number * self._n + new.index
        first = index not in self._offsets
        echo = self._echoes[number] if first else ""
        text = new.text if self.shows_samples else ""
        choice = CompletionChoice(
            index=index, text=echo + text, logprobs=None, finish_reason=new.finish_reason, stop_reason=new.stop_reason
        )
        if self._request.return_token_ids:
            choice.token_ids = new.token_ids if self.shows_samples else []
            choice.prompt_token_ids = self._prompts[number] if first else UNSET
        if self._request.prompt_logprobs is not None:
            choice.prompt_logprobs = list(prompt_logprobs)
        if new.logprobs is not None:
            self._add_logprobs(choice, number, new, prompt_logprobs if first else ())
        else:
            self._offsets[index] = 0
        return choice

    def _add_logprobs(
        self, choice: CompletionChoice, number: int, new: CompletionOutput, prompt_logprobs: Alternatives
    ) -> None:
        ids: list[int] = []
        entries: list[TokenAlternatives | None] = []
        if self._request.echo and prompt_logprobs:
            ids, entries = list(self._prompts[number]), list(prompt_logprobs)
        if self.shows_samples:
            ids += new.token_ids
            entries += new.logprobs or []
        offset = self._offsets.get(choice.index, 0)
        choice.logprobs = completion_logprobs(ids, entries, offset, self._tokenizer)
        self._offsets[choice.index] = offset + sum(map(len, choice.logprobs.tokens))
