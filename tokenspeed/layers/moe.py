"""Mixture-of-experts blocks, as plain ops."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.contracts.errors import FormatError
from tokenspeed.layers.mlp import gated_mlp
from tokenspeed.program.recorder import Recorder, Scope, Value


@dataclass(frozen=True)
class Moe:
    """One layer's experts. ff_size: of each expert; shared_ff_size: of the MLP that every token takes, 0 for none.

    score, renormalize, groups, kept_groups, scale: as `Recorder.route`. act, alpha, limit: as `Recorder.experts`.
    correction: a bias for choosing alone; biases: of the router and of the experts' projections. Raises FormatError for
    more experts to choose than there are, and for groups of unequal sizes.
    """

    num_experts: int
    top_k: int
    ff_size: int
    shared_ff_size: int = 0
    score: str = "softmax"
    renormalize: bool = True
    groups: int = 1
    kept_groups: int = 1
    scale: float = 1.0
    act: str = "silu"
    alpha: float = 0.0
    limit: float = 0.0
    correction: bool = False
    biases: bool = False

    def __post_init__(self) -> None:
        if self.num_experts % self.groups or not 0 < self.kept_groups <= self.groups:
            raise FormatError(f"{self.kept_groups} of {self.groups} groups of {self.num_experts} experts make no sense")
        choice = self.num_experts // self.groups * self.kept_groups
        if not 0 < self.top_k <= choice:
            raise FormatError(f"each token is to choose {self.top_k} of {choice} experts")


def feed_forward(g: Recorder, x: Value, w: Scope, act: str, moe: Moe | None) -> Value:
    """The layer's experts where it has a router, else its MLP."""
    return moe_block(g, x, w, moe) if moe is not None and w.has("router") else gated_mlp(g, x, w, act)


def moe_block(g: Recorder, x: Value, w: Scope, spec: Moe) -> Value:
    """Router, the chosen experts, and beside them the shared MLP where the model has one.

    Weights: router [experts, d], experts_gate_up [experts, 2 ff, d], experts_down [experts, d, ff]; optional
    router_bias, router_correction [experts], experts_gate_up_bias, experts_down_bias, shared_gate_up, shared_down.
    """
    logits = g.linear(x, w.router, w.router_bias if w.has("router_bias") else None)
    chosen = g.route(
        logits,
        w.router_correction if w.has("router_correction") else None,
        k=spec.top_k,
        score=spec.score,
        renormalize=spec.renormalize,
        groups=spec.groups,
        kept_groups=spec.kept_groups,
        scale=spec.scale,
    )
    biases = (w.experts_gate_up_bias, w.experts_down_bias) if w.has("experts_gate_up_bias") else None
    y = g.experts(
        x, chosen, w.experts_gate_up, w.experts_down, biases, act=spec.act, alpha=spec.alpha, limit=spec.limit
    )
    if not w.has("shared_gate_up"):
        return y
    return g.add(y, g.linear(g.act_mul(g.linear(x, w.shared_gate_up), spec.act), w.shared_down))
