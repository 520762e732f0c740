"""The first set of metrics: vLLM's names after the prefix `tokenspeed:`, with their meaning.

Names: https://docs.vllm.ai/en/latest/usage/metrics.html. Requests are counted per sample, as there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenspeed.engine.output import CompletionOutput, RequestOutput
from tokenspeed.engine.stream import PlainSink
from tokenspeed.observability.metrics import STEP_BOUNDS, Histogram
from tokenspeed.server.summary import RequestSummary

PREFIX = "tokenspeed:"
TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
E2E_BOUNDS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)

COUNT_BOUNDS = tuple(float(unit * 10**power) for power in range(6) for unit in (1, 2, 5))

GAUGES = {
    "num_requests_running": ("num_running", "Sequences being computed."),
    "num_requests_waiting": ("num_waiting", "Sequences waiting to be computed."),
}
"""Names, and where the engine's stats have them."""
KNOWN_GAUGES = {
    "floor_share": (
        "floor_share",
        "Floor of late decode steps (bytes over bandwidth) over their time.",
    ),
}
"""Left out where the engine does not know them."""
COUNTERS = {
    "num_preemptions": ("num_preemptions", "Sequences that had to give their pages back."),
    "prefix_cache_queries": ("prefix_queried_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
}
KNOWN_COUNTERS = {
    "device_idle_seconds": ("device_idle_s", "Time in which there was work and the device had none of it."),
}


def _no_stats() -> Mapping[str, float]:
    return {}


def _no_steps() -> Sequence[float]:
    return ()


@dataclass
class ServerMetrics:
    """Counters of one server. Only the event loop's thread touches them."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    """Samples by finish reason; "abort": the client left, or a shutdown ended it; "error": the engine refused it or
    died."""
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS))
    itl: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS))
    tpot: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS))
    e2e: Histogram = field(default_factory=lambda: Histogram(E2E_BOUNDS))
    queue: Histogram = field(default_factory=lambda: Histogram(E2E_BOUNDS))
    prefill: Histogram = field(default_factory=lambda: Histogram(E2E_BOUNDS))
    decode: Histogram = field(default_factory=lambda: Histogram(E2E_BOUNDS))
    inference: Histogram = field(default_factory=lambda: Histogram(E2E_BOUNDS))
    request_prompt_tokens: Histogram = field(default_factory=lambda: Histogram(COUNT_BOUNDS))
    request_generation_tokens: Histogram = field(default_factory=lambda: Histogram(COUNT_BOUNDS))
    engine_restarts: int = 0
    observers: list[Callable[[RequestSummary], None]] = field(default_factory=list)
    """Told of every request that ends."""
    _model: str = ""
    _stats: Callable[[], Mapping[str, float]] = _no_stats
    _step_times: Callable[[], Sequence[float]] = _no_steps
    _earlier: dict[str, float] = field(default_factory=dict)
    """What engines that ended had counted."""
    _earlier_steps: Histogram = field(default_factory=lambda: Histogram(STEP_BOUNDS))

    def serve(
        self, model: str, stats: Callable[[], Mapping[str, float]], step_times: Callable[[], Sequence[float]]
    ) -> None:
        """Name the model, and where the engine's own figures come from."""
        self.engine_restarts += bool(self._model)
        self._model, self._stats, self._step_times = model, stats, step_times

    def engine_ended(self) -> None:
        """Keep what the engine has counted; nothing runs or waits any more."""
        stats, self._stats = self._stats(), _no_stats
        for key, _ in (COUNTERS | KNOWN_COUNTERS).values():
            if key in stats:
                self._earlier[key] = self._earlier.get(key, 0) + stats[key]
        self._earlier_steps.add(self._step_times())
        self._step_times = _no_steps

    def render(self) -> bytes:
        """Prometheus' text format, version 0.0.4."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(self._families))
        return generate_latest(registry)

    def _families(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, (key, text) in GAUGES.items():
            yield self._gauge(name, text, stats.get(key, 0))
        usage = stats.get("pages_held", 0) / max(1, stats.get("pages_total", 0))
        yield self._gauge("kv_cache_usage_perc", "KV pages that sequences hold; 1 is all of them.", usage)
        for name, (key, text) in COUNTERS.items():
            yield self._counter(name, text, self._earlier.get(key, 0) + stats.get(key, 0))
        yield from self._known(stats)
        yield self._counter("engine_restarts", "Engines that took the place of one that failed.", self.engine_restarts)
        yield self._counter("prompt_tokens", "Prompt tokens of requests that gave output.", self.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", self.generation_tokens)
        finished = CounterMetricFamily(
            f"{PREFIX}request_success", "Samples that ended, by reason.", labels=["model_name", "finished_reason"]
        )
        for reason in ("stop", "length", "abort", "error"):
            finished.add_metric([self._model, reason], self.finished[reason])
        yield finished
        yield self._histogram("time_to_first_token_seconds", "Arrival to first token.", self.ttft)
        yield self._histogram("inter_token_latency_seconds", "Between two outputs of a sample.", self.itl)
        yield self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", self.tpot
        )
        yield self._histogram("e2e_request_latency_seconds", "Arrival to last token.", self.e2e)
        yield self._histogram("request_queue_time_seconds", "Arrival to first being fed.", self.queue)
        yield self._histogram("request_prefill_time_seconds", "First being fed to first token.", self.prefill)
        yield self._histogram("request_decode_time_seconds", "First token to last token.", self.decode)
        yield self._histogram("request_inference_time_seconds", "First being fed to last token.", self.inference)
        yield self._histogram("request_prompt_tokens", "Prompt tokens of a sample.", self.request_prompt_tokens)
        yield self._histogram("request_generation_tokens", "Tokens of a sample.", self.request_generation_tokens)

    def _known(self, stats: Mapping[str, float]) -> Iterable[Metric]:
        """What not every engine knows of its device, and the times of its steps."""
        for name, (key, text) in KNOWN_GAUGES.items():
            if key in stats:
                yield self._gauge(name, text, stats[key])
        for name, (key, text) in KNOWN_COUNTERS.items():
            if key in stats or key in self._earlier:
                yield self._counter(name, text, self._earlier.get(key, 0) + stats.get(key, 0))
        steps = Histogram(STEP_BOUNDS)
        steps.add(self._earlier_steps.state())
        steps.add(self._step_times())
        yield self._histogram("step_time_seconds", "Times of the engine's steps.", steps)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], histogram.cumulative(), histogram.total)
        return family


class _Families(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()


class RequestMeter:
    """Times of one request's samples. `arrival`: seconds of perf_counter, as those that `observe` is given. `summary`
    is filled in as they come."""

    def __init__(self, metrics: ServerMetrics, arrival: float, summary: RequestSummary) -> None:
        self._metrics, self._arrival, self._summary = metrics, arrival, summary
        self._samples: dict[int, _Sample] = {}

    def observe(self, output: RequestOutput, now: float) -> None:
        """Take in what came of the request at `now`."""
        if not self._samples:
            self._metrics.prompt_tokens += len(output.prompt_token_ids)
        for completion in output.outputs:
            self._observe(output, completion, now)
        self._summary.cached_tokens, self._summary.queue_s = output.num_cached_tokens, output.metrics.queue_s

    def metered(self, write: Callable[[str], bool]) -> PlainSink:
        """Writes the text of a lone sample that has begun, and takes in its tokens."""
        return _Metered(write, self._metrics, self._samples[0]).take

    @property
    def num_tokens(self) -> int:
        """Of all samples, so far."""
        return sum(sample.tokens for sample in self._samples.values())

    def end(self, reason: str, now: float) -> None:
        """The request ends at `now`; those of its samples that had not finished did so for this reason."""
        summary, samples = self._summary, self._samples.values()
        left = summary.samples - sum(sample.ended for sample in samples)
        self._metrics.finished[reason] += left
        summary.finish_reasons += [reason] * left
        summary.output_tokens = self.num_tokens
        summary.total_s = now - self._arrival
        firsts = [sample.first for sample in samples if sample.tokens]
        if firsts:
            summary.ttft_s = min(firsts) - self._arrival
        if per_token := [sample.tpot_s for sample in samples if sample.tokens > 1]:
            summary.tpot_s = sum(per_token) / len(per_token)
        for observer in self._metrics.observers:
            observer(summary)

    def _observe(self, output: RequestOutput, completion: CompletionOutput, now: float) -> None:
        metrics, tokens = self._metrics, len(completion.token_ids)
        sample = self._samples.get(completion.index)
        if sample is None:
            self._samples[completion.index] = sample = _Sample()
        if tokens and sample.tokens == 0:
            sample.first = now
            metrics.ttft.observe(now - self._arrival)
        elif tokens:
            metrics.itl.observe(now - sample.last)
        if tokens:
            metrics.generation_tokens += tokens
            sample.tokens += tokens
            sample.last = now
        if completion.finish_reason is not None and not sample.ended:
            sample.ended = True
            metrics.finished[completion.finish_reason] += 1
            self._summary.finish_reasons.append(completion.finish_reason)
            metrics.e2e.observe(now - self._arrival)
            metrics.request_prompt_tokens.observe(len(output.prompt_token_ids))
            metrics.request_generation_tokens.observe(sample.tokens)
            if sample.tokens > 1:
                metrics.tpot.observe(sample.tpot_s)
            if sample.tokens and output.metrics.queue_s is not None:
                self._observe_phases(sample, output.metrics.queue_s)

    def _observe_phases(self, sample: _Sample, queue_s: float) -> None:
        metrics, decode_s = self._metrics, sample.last - sample.first
        prefill_s = max(0.0, sample.first - self._arrival - queue_s)
        metrics.queue.observe(queue_s)
        metrics.prefill.observe(prefill_s)
        metrics.decode.observe(decode_s)
        metrics.inference.observe(prefill_s + decode_s)


class _Metered:
    __slots__ = ("_metrics", "_sample", "_write")

    def __init__(self, write: Callable[[str], bool], metrics: ServerMetrics, sample: _Sample) -> None:
        self._write, self._metrics, self._sample = write, metrics, sample

    def take(self, text: str, num_tokens: int) -> bool:
        """Implements `PlainSink`."""
        if not self._write(text):
            return False
        metrics, sample, now = self._metrics, self._sample, perf_counter()
        metrics.itl.observe(now - sample.last)
        metrics.generation_tokens += num_tokens
        sample.tokens += num_tokens
        sample.last = now
        return True


@dataclass(slots=True)
class _Sample:
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    ended: bool = False

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first, of which there must be some."""
        return (self.last - self.first) / (self.tokens - 1)
