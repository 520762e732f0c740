"""What a request adds to the metrics, with times that the test chooses."""

from __future__ import annotations

from tokenspeed.engine.output import CompletionOutput, RequestMetrics, RequestOutput
from tokenspeed.server.metrics import RequestMeter, ServerMetrics
from tokenspeed.server.summary import RequestSummary


def output(index: int, tokens: int, finish_reason: str | None = None) -> RequestOutput:
    completion = CompletionOutput(index, [], [5] * tokens, finish_reason=finish_reason)
    return RequestOutput("r", None, [1, 2, 3], [completion], RequestMetrics(0.0))


def summary(samples: int = 2) -> RequestSummary:
    return RequestSummary("r", [1, 2, 3], samples)


def test_times_of_two_samples() -> None:
    metrics = ServerMetrics()
    meter = RequestMeter(metrics, 10.0, summary())
    for now, new in [
        (10.5, output(0, 1)),
        (11.0, output(1, 2)),
        (11.5, output(0, 3)),
        (12.0, output(0, 0, "stop")),
        (13.0, output(1, 1, "length")),
    ]:
        meter.observe(new, now)
    meter.end("abort", 14.0)
    assert (metrics.prompt_tokens, metrics.generation_tokens) == (3, 7)
    assert metrics.finished == {"stop": 1, "length": 1, "abort": 0}
    assert (metrics.ttft.count, metrics.ttft.total) == (2, 0.5 + 1.0)
    assert (metrics.itl.count, metrics.itl.total) == (2, 1.0 + 2.0)
    assert (metrics.tpot.count, metrics.tpot.total) == (2, 1.0 / 3 + 2.0 / 2)
    assert (metrics.e2e.count, metrics.e2e.total) == (2, 2.0 + 3.0)


def test_phases_need_the_time_in_the_queue() -> None:
    metrics = ServerMetrics()
    for queue_s in (None, 0.25, 9.0):
        meter = RequestMeter(metrics, 10.0, summary())
        for now, new in ((11.0, output(0, 1)), (13.5, output(0, 2, "stop"))):
            new.metrics.queue_s = queue_s
            meter.observe(new, now)
    assert (metrics.queue.count, metrics.queue.total) == (2, 9.25)
    assert (metrics.prefill.count, metrics.prefill.total) == (2, 0.75)
    assert (metrics.decode.count, metrics.decode.total) == (2, 5.0)
    assert (metrics.inference.count, metrics.inference.total) == (2, 5.75)
    assert (metrics.request_prompt_tokens.count, metrics.request_prompt_tokens.total) == (3, 9)
    assert (metrics.request_generation_tokens.count, metrics.request_generation_tokens.total) == (3, 9)


def test_samples_that_did_not_end() -> None:
    metrics = ServerMetrics()
    meter = RequestMeter(metrics, 0.0, summary(3))
    meter.observe(output(0, 1, "stop"), 1.0)
    meter.end("error", 2.0)
    assert metrics.finished == {"stop": 1, "error": 2}
    assert metrics.tpot.count == 0
