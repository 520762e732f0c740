"""Every step of a run on the device's clock, with the gap before it and what the host did for it: where a run through
`LLM.generate` takes longer than its graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tokenspeed.bench.gpu.decode import timed_ms
from tokenspeed.bench.gpu.stamps import stamped
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.trace import Span, StepTrace

PHASES = ("schedule", "launch", "collect", "update")
WARM_RUNS = 2
"""A kind of step is eager at first, then captured."""
LATE_US = 50.0
"""A gap that is told by itself."""


@dataclass(frozen=True)
class TimedStep:
    """tokens: the most that it feeds. device, gap: microseconds from its first stamp to its last, and from the last of
    the step before (0 for the first). ahead: for how long it had been launched when the device began it; about 0 or
    less where the device waited for the host. host: microseconds of each of PHASES."""

    tokens: int
    device: float
    gap: float
    ahead: float
    host: tuple[float, ...]

    def row(self, number: int) -> str:
        """A line of the table."""
        host = " ".join(f"{each:9.1f}" for each in self.host)
        return f"{number:6d} {self.tokens:6d} {self.device:10.1f} {self.gap:8.1f} {self.ahead:9.1f} {host}"


def timeline(llm: LLM, batch: int, context: int, tokens: int) -> list[TimedStep]:
    """Steps of `batch` prompts of `context` tokens from the first to the last, greedy. The engine has to be idle; its
    graphs are captured anew. Raises UnsupportedError where it has none, RuntimeError where the run is too long."""
    with stamped(llm) as ring:
        for _ in range(WARM_RUNS):
            timed_ms(llm, batch, context, tokens, draws=False)
        ring.clear()
        trace = llm.core.trace = StepTrace(until=2**62)
        try:
            timed_ms(llm, batch, context, tokens, draws=False)
        finally:
            llm.core.trace = None
        starts, ends = ring.read()
    return joined(starts, ends, trace.spans)


def joined(starts: Sequence[int], ends: Sequence[int], spans: Sequence[Span]) -> list[TimedStep]:
    """Stamps in ns and phases of the same steps, each in order of launch. The clocks are put together by the step whose
    result the host had soonest after its end. Raises RuntimeError where the steps are not the same."""
    steps = {span.step_id: span.num_tokens for span in spans if span.name == "launch"}
    if len(steps) != len(starts):
        raise RuntimeError(f"{len(starts)} steps have stamps, {len(steps)} were launched")
    took = {(span.step_id, span.name): span.seconds * 1e6 for span in spans}
    over = {(span.step_id, span.name): (span.start + span.seconds) * 1e6 for span in spans}
    between = min(over[step, "collect"] - end / 1e3 for step, end in zip(steps, ends, strict=True))
    found, before = [], starts[0]
    for (step, tokens), start, end in zip(steps.items(), starts, ends, strict=True):
        ahead = start / 1e3 + between - over[step, "launch"]
        host = tuple(took.get((step, name), 0.0) for name in PHASES)
        found.append(TimedStep(tokens, (end - start) / 1e3, (start - before) / 1e3, ahead, host))
        before = end
    return found


def text(steps: Sequence[TimedStep]) -> str:
    """As a table in microseconds, and what it amounts to by the tokens of a step."""
    phases = " ".join(f"{name:>9}" for name in PHASES)
    lines = [f"{'step':>6} {'tokens':>6} {'device':>10} {'gap':>8} {'ahead':>9} {phases}  (us)"]
    lines += [step.row(number) for number, step in enumerate(steps)]
    for tokens in sorted({step.tokens for step in steps}, reverse=True):
        alike = [step for step in steps if step.tokens == tokens]
        device, gap = (median(each) for each in zip(*((step.device, step.gap) for step in alike), strict=True))
        lines.append(f"{len(alike)} steps of {tokens} tokens: median {device:.1f} us, {gap:.1f} us before each")
    late = [number for number, step in enumerate(steps) if step.gap > LATE_US]
    device_ms, idle_ms = (sum(each) / 1e3 for each in zip(*((step.device, step.gap) for step in steps), strict=True))
    lines.append(f"in all {device_ms:.2f} ms in steps, {idle_ms:.3f} ms between; gaps over {LATE_US:.0f} us: {late}")
    return "\n".join(lines)
