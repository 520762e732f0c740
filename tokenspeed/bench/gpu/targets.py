"""What the figures of one H200 have to reach, by id; docs/benchmarks.md says where the numbers come from."""

from __future__ import annotations

from tokenspeed.bench.record import Target

DECODE_MS = {
    "llama-3.2-1b.bf16": {1: 0.76, 8: 0.95, 32: 1.2, 128: 2.2},
    "llama-3.1-8b.bf16": {1: 3.75, 8: 4.2, 32: 5.2, 128: 9.2},
    "llama-3.1-8b.fp8": {1: 2.25, 32: 3.7, 128: 7.5},
    "llama-3.1-8b.int4": {1: 1.45},
    "qwen3-30b-a3b.bf16": {1: 1.9, 8: 7.4, 32: 14.4, 128: 19.0},
    "qwen3-30b-a3b.fp8": {1: 1.25, 8: 4.4, 32: 8.4, 128: 12.0},
    "gpt-oss-20b.mxfp4": {1: 1.3, 8: 2.8, 32: 4.0, 128: 5.2},
}
FIRST_MS = {"llama-3.2-1b.bf16": 5.0, "llama-3.1-8b.bf16": 24.0, "llama-3.1-8b.fp8": 14.0}
START_S = {"warm": 12.0, "cold": 40.0}
DEEP = ("ctx128", "ctx8192", "ctx32768")
SHARE, DEEP_SHARE = 0.75, 0.82
"""Of the floor, at one sequence and other contexts than 1024; of 8B at the long ones."""
SAMPLED_RATIO = 1.05
"""Of the greedy time."""
HOST_SHARE, HOST_US = 0.03, 10.0
"""A step may take so much longer than its graph, replayed back to back."""
IDLE_US, IDLE_P99_US = 4.0, 20.0
ITL_P99_MS = 18.0
PREFILL_SHARE = 80.0
"""Per cent of the rate that the same prompt has alone at the same cap."""
LOAD_SHARE = 0.7
"""Of the smaller of what the link takes and the speed at which threads read the same files."""
REFERENCE, REFERENCE_RATIO = 0.05, 1.2
"""Mean difference of log-probabilities, and times Hugging Face's in the same format."""


def target_of(id: str) -> Target | None:
    """The target of a figure whose bound is a constant."""
    return _TARGETS.get(id)


def host_target(graph_ms: float) -> Target:
    """Of the difference, in us, between a step and its graph alone."""
    return Target(at_most=HOST_SHARE * graph_ms * 1e3 + HOST_US)


def reference_target(theirs: float) -> Target:
    """Of the mean difference to the reference, beside that of Hugging Face."""
    return Target(at_most=min(REFERENCE, REFERENCE_RATIO * theirs))


def _targets() -> dict[str, Target]:
    found = {f"{m}.decode.b{b}": Target(at_most=ms) for m, row in DECODE_MS.items() for b, ms in row.items()}
    found |= {f"{m}.decode.b{b}.sampled": Target(of="ratio", at_most=SAMPLED_RATIO) for m in DECODE_MS for b in
              DECODE_MS[m]}  # fmt: skip
    found |= {f"{m}.decode.b1.{deep}": Target(of="share", at_least=SHARE) for m in DECODE_MS for deep in DEEP}
    large = [m for m in DECODE_MS if "-8b" in m]
    found |= {f"{m}.decode.b1.{deep}": Target(of="share", at_least=DEEP_SHARE) for m in large for deep in DEEP[1:]}
    found |= {f"{m}.ttft1024": Target(at_most=ms) for m, ms in FIRST_MS.items()}
    found |= {f"llama-3.1-8b.bf16.start.{kind}": Target(at_most=s) for kind, s in START_S.items()}
    found |= {f"{m}.idle.b1": Target(at_most=IDLE_US) for m in DECODE_MS}
    found |= {f"{m}.idle.b1.p99": Target(at_most=IDLE_P99_US) for m in DECODE_MS}
    found["llama-3.1-8b.bf16.mixed.itl_p99"] = Target(at_most=ITL_P99_MS)
    found["llama-3.1-8b.bf16.mixed.prefill"] = Target(at_least=PREFILL_SHARE)
    found["loading.load_share"] = Target(at_least=LOAD_SHARE)
    return {f"h200.{id}": target for id, target in found.items()}


_TARGETS = _targets()
