"""Counting and joining the outputs of a request as they pass by."""

from __future__ import annotations

from collections.abc import Sequence

from tokenspeed.engine.output import RequestMetrics, RequestOutput
from tokenspeed.engine.stream import merged
from tokenspeed.server.engine import Info
from tokenspeed.server.generation import Generation
from tokenspeed.server.openai.responses import CachedTokens, PoolingUsage, Timings, Usage
from tokenspeed.server.openai.timings import response_timings


class UsageCount:
    """Tokens of all prompts of a request and of all their samples."""

    def __init__(self, generation: Generation) -> None:
        self._prompts: dict[int, tuple[int, int, RequestMetrics]] = {}
        self._generation = generation
        self._num_running = generation.num_prompts

    def add(self, number: int, output: RequestOutput) -> None:
        """Take in an output of prompt `number`."""
        self._prompts[number] = len(output.prompt_token_ids), output.num_cached_tokens, output.metrics
        self._num_running -= output.finished

    @property
    def complete(self) -> bool:
        """Whether every prompt has given its last output."""
        return self._num_running == 0

    def timings(self, info: Info) -> Timings:
        """Of all prompts, once they are complete."""
        return response_timings(list(self._prompts.values()), info)

    def usage(self, *, samples_shown: bool = True) -> Usage:
        """The sums."""
        prompt = sum(tokens for tokens, _, _ in self._prompts.values())
        completion = self._generation.num_tokens if samples_shown else 0
        cached = CachedTokens(sum(cached for _, cached, _ in self._prompts.values()))
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=cached,
        )


async def gather(generation: Generation) -> tuple[list[RequestOutput], UsageCount]:
    """Wait for all of a generation: one whole output per prompt, its samples in order."""
    whole: dict[int, RequestOutput] = {}
    count = UsageCount(generation)
    with generation:
        async for number, output in generation.outputs():
            count.add(number, output)
            whole[number] = merged(whole.get(number), output)
    outputs = [whole[number] for number in sorted(whole)]
    for output in outputs:
        output.outputs.sort(key=lambda sample: sample.index)
    return outputs, count


def pooling_usage(outputs: Sequence[RequestOutput]) -> PoolingUsage:
    """Of requests that gave no tokens."""
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return PoolingUsage(prompt_tokens=tokens, total_tokens=tokens)
