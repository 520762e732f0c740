"""Random routers and experts, and what they give in float64, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Router:
    """Attributes of `route` and what goes in."""

    name: str
    experts: int
    attrs: dict[str, Any]
    biased: bool = False

    def random(self, rows: int, rng: np.random.Generator) -> tuple[Array, Array | None]:
        """Scores [rows, experts] and a bias or None, float32."""
        logits = rng.normal(size=(rows, self.experts)).astype(np.float32)
        bias = (0.3 * rng.normal(size=self.experts)).astype(np.float32)
        return logits, bias if self.biased else None


def _router(name: str, experts: int, k: int, score: str, biased: bool = False, **changes: Any) -> Router:
    attrs = {"k": k, "score": score, "renormalize": True, "groups": 1, "kept_groups": 1, "scale": 1.0}
    return Router(name, experts, attrs | changes, biased)


ROUTERS = (
    _router("mixtral", 8, 2, "softmax"),
    _router("qwen3_moe", 128, 8, "softmax"),
    _router("not renormalised", 37, 5, "softmax", renormalize=False, scale=1.7),
    _router("all of them", 3, 3, "softmax", renormalize=False),
    _router("best group", 12, 3, "softmax", groups=3, kept_groups=1),
    _router("gpt_oss", 32, 4, "logits"),
    _router("minimax_m2", 256, 8, "sigmoid", biased=True),
    _router("glm4_moe", 64, 6, "sigmoid", biased=True, scale=2.5),
    _router("two best groups", 24, 4, "sigmoid", biased=True, groups=8, kept_groups=2),
    _router("groups of one", 6, 2, "sigmoid", groups=6, kept_groups=3, renormalize=False),
)


def naive_route(router: Router, logits: Array, bias: Array | None) -> tuple[Array, Array, Array]:
    """Ids and shares [rows, k], and by how much the nearest other choice was missed [rows]."""
    rows = [_route_row(router.attrs, row.astype(float), bias) for row in logits]
    ids, shares, margins = zip(*rows, strict=True)
    return np.array(ids), np.array(shares), np.array(margins)


def _route_row(attrs: dict[str, Any], logits: Array, bias: Array | None) -> tuple[list[int], list[float], float]:
    scores = logits.tolist()
    if attrs["score"] == "sigmoid":
        scores = [1 / (1 + np.exp(-x)) for x in scores]
    if attrs["score"] == "softmax":
        scores = [np.exp(x) / sum(np.exp(y) for y in scores) for x in scores]
    choice = [s + (0.0 if bias is None else float(bias[i])) for i, s in enumerate(scores)]
    allowed, margin = _allowed(attrs, choice)
    ranked = sorted(allowed, key=lambda i: -choice[i])
    ids, k = ranked[: attrs["k"]], attrs["k"]
    gaps = [choice[a] - choice[b] for a, b in pairwise(ranked[: k + 1])]
    if attrs["score"] == "logits":
        total = sum(np.exp(scores[i]) for i in ids)
        return ids, [np.exp(scores[i]) / total * attrs["scale"] for i in ids], min([margin, *gaps])
    total = sum(scores[i] for i in ids) if attrs["renormalize"] else 1.0
    return ids, [scores[i] / total * attrs["scale"] for i in ids], min([margin, *gaps])


def _allowed(attrs: dict[str, Any], choice: list[float]) -> tuple[list[int], float]:
    """Experts of the groups that are kept, and the margin of that."""
    groups, kept, width = attrs["groups"], attrs["kept_groups"], len(choice) // attrs["groups"]
    best = 2 if attrs["score"] == "sigmoid" else 1
    parts = [choice[g * width : (g + 1) * width] for g in range(groups)]
    values = [sum(sorted(part, reverse=True)[:best]) for part in parts]
    order = sorted(range(groups), key=lambda g: -values[g])
    margin = values[order[kept - 1]] - values[order[kept]] if kept < groups else np.inf
    return [g * width + i for g in order[:kept] for i in range(width)], margin


def naive_experts(
    x: Array, ids: Array, shares: Array, matrices: Sequence[Array], biases: Sequence[Array], attrs: dict[str, Any]
) -> Array:
    """One choice at a time: x [tokens, H], ids and shares [tokens, k], gate_up [E, 2 F, H], down [E, H, F]."""
    out = np.zeros(x.shape)
    for t in range(len(x)):
        for expert, share in zip(ids[t], shares[t], strict=True):
            both = matrices[0][expert] @ x[t] + (biases[0][expert] if biases else 0.0)
            hidden = naive_gate(both[: len(both) // 2], both[len(both) // 2 :], attrs)
            out[t] += share * (matrices[1][expert] @ hidden + (biases[1][expert] if biases else 0.0))
    return out


def naive_gate(gate: Array, up: Array, attrs: dict[str, Any]) -> Array:
    """Float64: what goes down."""
    if attrs["act"] == "swiglu_clamped":
        gate, up = np.minimum(gate, attrs["limit"]), np.clip(up, -attrs["limit"], attrs["limit"])
        return gate / (1 + np.exp(np.minimum(-attrs["alpha"] * gate, 700))) * (up + 1)
    t = gate if attrs["act"] == "silu" else np.sqrt(8 / np.pi) * (gate + 0.044715 * gate**3)
    return gate / (1 + np.exp(np.minimum(-t, 700))) * up
