"""Counting and joining the outputs of a request as they pass by."""

from __future__ import annotations

from tokenspeed.engine.output import RequestOutput
from tokenspeed.engine.stream import merged
from tokenspeed.server.generation import Generation
from tokenspeed.server.openai.responses import CachedTokens, Usage


class UsageCount:
    """Tokens of all prompts of a request and of all their samples."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._completion = 0

    def add(self, number: int, output: RequestOutput) -> None:
        """Take in an output of prompt `number`."""
        self._prompts[number] = len(output.prompt_token_ids), output.num_cached_tokens
        self._completion += sum(len(completion.token_ids) for completion in output.outputs)

    def usage(self, *, samples_shown: bool = True) -> Usage:
        """The sums."""
        prompt = sum(tokens for tokens, _ in self._prompts.values())
        completion = self._completion if samples_shown else 0
        cached = CachedTokens(sum(cached for _, cached in self._prompts.values()))
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=cached,
        )


async def gather(generation: Generation) -> tuple[list[RequestOutput], UsageCount]:
    """Wait for all of a generation: one whole output per prompt, its samples in order."""
    whole: dict[int, RequestOutput] = {}
    count = UsageCount()
    with generation:
        async for number, output in generation.outputs():
            count.add(number, output)
            whole[number] = merged(whole.get(number), output)
    outputs = [whole[number] for number in sorted(whole)]
    for output in outputs:
        output.outputs.sort(key=lambda sample: sample.index)
    return outputs, count
