"""What a request adds to the metrics, with times that the test chooses."""

from __future__ import annotations

from tokenspeed.engine.output import CompletionOutput, RequestMetrics, RequestOutput
from tokenspeed.server.metrics import RequestMeter, ServerMetrics


def output(index: int, tokens: int, finish_reason: str | None = None) -> RequestOutput:
    completion = CompletionOutput(index, [], [5] * tokens, finish_reason=finish_reason)
    return RequestOutput("r", None, [1, 2, 3], [completion], RequestMetrics(0.0))


def test_times_of_two_samples() -> None:
    metrics = ServerMetrics()
    meter = RequestMeter(metrics, arrival=10.0)
    for now, new in [
        (10.5, output(0, 1)),
        (11.0, output(1, 2)),
        (11.5, output(0, 3)),
        (12.0, output(0, 0, "stop")),
        (13.0, output(1, 1, "length")),
    ]:
        meter.observe(new, now)
    meter.end(2, "abort")
    assert (metrics.prompt_tokens, metrics.generation_tokens) == (3, 7)
    assert metrics.finished == {"stop": 1, "length": 1, "abort": 0}
    assert (metrics.ttft.count, metrics.ttft.total) == (2, 0.5 + 1.0)
    assert (metrics.itl.count, metrics.itl.total) == (2, 1.0 + 2.0)
    assert (metrics.tpot.count, metrics.tpot.total) == (2, 1.0 / 3 + 2.0 / 2)
    assert (metrics.e2e.count, metrics.e2e.total) == (2, 2.0 + 3.0)


def test_samples_that_did_not_end() -> None:
    metrics = ServerMetrics()
    meter = RequestMeter(metrics, arrival=0.0)
    meter.observe(output(0, 1, "stop"), 1.0)
    meter.end(3, "error")
    assert metrics.finished == {"stop": 1, "error": 2}
    assert metrics.tpot.count == 0
