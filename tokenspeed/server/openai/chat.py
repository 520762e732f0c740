"""/v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator

from msgspec import UNSET
from starlette.responses import Response

from tokenspeed.engine.output import CompletionOutput
from tokenspeed.server.direct import TextWriter
from tokenspeed.server.engine import Info
from tokenspeed.server.generation import Generation
from tokenspeed.server.limits import check_params
from tokenspeed.server.openai.gather import UsageCount, gather
from tokenspeed.server.openai.logprobs import chat_logprobs
from tokenspeed.server.openai.prompts import chat_prompt, check_length
from tokenspeed.server.openai.replies import Replies, check_tools, says_nothing
from tokenspeed.server.openai.requests import ChatRequest, decode_chat
from tokenspeed.server.openai.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from tokenspeed.server.openai.sampling import chat_params
from tokenspeed.server.sse import event, event_reply, json_reply, text_writer
from tokenspeed.server.state import ServerState


async def chat(state: ServerState, body: bytes) -> Response:
    """Answer a request. Raises ApiError and the errors of `contracts.errors` for one that is refused."""
    request = decode_chat(body)
    engine = state.ready(request.model)
    state.admission.check(engine)
    check_tools(request, state.reply_format)
    prompt = await chat_prompt(request, state)
    check_length([prompt], engine, "messages")
    stop_ids = state.reply_format.stop_ids if state.reply_format else ()
    params = chat_params(request, engine.info.sampling_defaults, state.chat_template.stop, stop_ids)
    check_params(request.stop, params, state.limits)
    reply = _Reply(request, state, prompt, engine.info)
    generation = Generation(
        engine,
        state.metrics,
        state.admission,
        [prompt],
        params,
        request_id=reply.id,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
    )
    if not request.stream:
        return json_reply(reply.whole(generation))
    count = UsageCount(generation)
    return event_reply(reply.events(generation, count), lambda writer: reply.push(generation, writer))


class _Reply:
    """Makes the response of one request, whole or as events."""

    def __init__(self, request: ChatRequest, state: ServerState, prompt: list[int], info: Info) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._request, self._prompt = request, prompt
        self._model = request.model or state.names[0]
        self._tokenizer, self._info = state.tokenizer, info
        self._with_ids = bool(request.return_token_ids)
        self._replies = Replies(state.reply_format, request) if state.reply_format else None

    async def whole(self, generation: Generation) -> ChatCompletion:
        (output,), count = await gather(generation)
        return ChatCompletion(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[self._choice(sample) for sample in output.outputs],
            usage=count.usage(),
            timings=count.timings(self._info),
            prompt_token_ids=self._prompt if self._with_ids else UNSET,
            prompt_logprobs=UNSET if output.prompt_logprobs is None else output.prompt_logprobs,
        )

    async def events(self, generation: Generation, count: UsageCount) -> AsyncGenerator[bytes, None]:
        """An event for each piece of each sample; the first of a sample names the role."""
        begun, head = set[int](), self._head()
        head.prompt_token_ids = self._prompt if self._with_ids else UNSET
        with generation:
            async for number, output in generation.outputs():
                count.add(number, output)
                for new in output.outputs:
                    choice = self._chunk_choice(new, first=new.index not in begun)
                    if self._replies is not None and says_nothing(choice):
                        continue
                    head.choices = [choice]
                    begun.add(new.index)
                    if count.complete and new is output.outputs[-1] and not self._request.include_usage:
                        head.timings = count.timings(self._info)
                    yield event(head)
                    head.prompt_token_ids = UNSET
        if self._request.include_usage:
            head.choices, head.usage, head.timings = [], count.usage(), count.timings(self._info)
            yield event(head)

    def push(self, generation: Generation, writer: TextWriter) -> None:
        """Send the events of plain text past `events`, once that has sent one."""
        if not self._with_ids and self._replies is None:
            generation.push(text_writer(writer, self._example))

    def _example(self, text: str) -> bytes:
        head = self._head()
        head.choices = [self._chunk_choice(CompletionOutput(0, [text]), first=False)]
        return event(head)

    def _head(self) -> ChatChunk:
        usage = None if self._request.include_usage else UNSET
        return ChatChunk(id=self.id, created=self._created, model=self._model, choices=[], usage=usage)

    def _choice(self, sample: CompletionOutput) -> ChatChoice:
        message = ChatMessage(content=sample.text)
        if self._replies is not None:
            message, sample = self._replies.whole(sample)
        return ChatChoice(
            index=sample.index,
            message=message,
            logprobs=self._logprobs(sample),
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            token_ids=sample.token_ids if self._with_ids else UNSET,
        )

    def _chunk_choice(self, new: CompletionOutput, first: bool) -> ChatChunkChoice:
        delta = ChatDelta(content=new.text)
        if self._replies is not None:
            delta, new = self._replies.delta(new)
        delta.role = "assistant" if first else None
        return ChatChunkChoice(
            index=new.index,
            delta=delta,
            logprobs=self._logprobs(new),
            finish_reason=new.finish_reason,
            stop_reason=new.stop_reason,
            token_ids=new.token_ids if self._with_ids else UNSET,
        )

    def _logprobs(self, new: CompletionOutput) -> ChatLogprobs | None:
        if new.logprobs is None:
            return None
        return chat_logprobs(new.token_ids, new.logprobs, self._request.top_logprobs or 0, self._tokenizer)
