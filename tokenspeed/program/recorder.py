"""Runs a model's wiring once with symbolic values and writes down what it did.

Additions that a user of a model asks for are made here, so no model file knows of them: `adapters` adds a low-rank
delta to the linear of a weight, `capture` keeps the hidden state that feeds the op of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.ops.definitions import OPS, TOKENS, Shape
from tokenspeed.ops.rope import Rope
from tokenspeed.program.program import Program, Record


@dataclass(frozen=True)
class Value:
    """A symbolic result: its number and shape."""

    id: int
    shape: Shape


class Scope:
    """Names of weights under a prefix: `Scope(names, "layers.3.").qkv` is the weight name "layers.3.qkv"."""

    def __init__(self, names: Iterable[str], prefix: str = "") -> None:
        self._names = {name[len(prefix) :]: name for name in names if name.startswith(prefix)}

    def __getattr__(self, name: str) -> str:
        if name.startswith("_") or name not in self._names:
            raise AttributeError(f"no weight {name!r} here; there are: {', '.join(sorted(self._names))}")
        return self._names[name]

    def has(self, name: str) -> bool:
        """Whether this model has the optional weight `name`."""
        return name in self._names


class Recorder:
    """The `g` of a model file. Each method records one op and returns its symbolic outputs."""

    def __init__(
        self,
        weight_shapes: Mapping[str, tuple[int, ...]],
        adapters: Mapping[str, int] | None = None,
        capture: Iterable[str] = (),
    ) -> None:
        """adapters: rank of the delta per weight name; its factors are weights NAME.lora_a [rank, in], NAME.lora_b
        [out, rank].

        capture: weight names; the value entering the op that reads it becomes the program output "hidden.NAME".
        """
        self._weight_shapes = dict(weight_shapes)
        self._adapters = dict(adapters or {})
        self._capture = set(capture)
        self._records: list[Record] = []
        self._shapes: list[Shape] = []
        self._outputs: dict[str, int] = {}
        self.tokens = self._value((TOKENS,))

    def weights(self, prefix: str = "") -> Scope:
        """Weight names under a prefix, as attributes."""
        return Scope(self._weight_shapes, prefix)

    def shape(self, weight: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self._weight_shapes[weight]

    def embed(self, tokens: Value, table: str, *, scale: float = 1.0) -> Value:
        """Rows of `table` for token ids, times scale."""
        return self._one("embed", [tokens], [table], scale=scale)

    def norm(self, x: Value, weight: str, *, eps: float, per_head: bool = False) -> Value:
        """RMS norm of each row, or of each head (as wide as the weight)."""
        width = self._weight_shapes[weight][0] if per_head else 0
        return self._one("norm", [x], [weight], eps=eps, per_head=width)

    def linear(self, x: Value, weight: str, bias: str | None = None) -> Value:
        """x W^T (+ bias)."""
        y = self._one("linear", [x], [weight] if bias is None else [weight, bias])
        rank = self._adapters.get(weight)
        if rank is None:
            return y
        rows, cols = self._weight_shapes[weight]
        down, up = f"{weight}.lora_a", f"{weight}.lora_b"
        self._weight_shapes |= {down: (rank, cols), up: (rows, rank)}
        delta = self._one("linear", [self._one("linear", [x], [down])], [up])
        return self.add(y, delta)

    def split(self, x: Value, *sizes: int) -> tuple[Value, ...]:
        """Views of consecutive columns."""
        return self._record("split", [x], [], sizes=sizes)

    def rope(self, q: Value, k: Value, rope: Rope, *, head_dim: int) -> tuple[Value, Value]:
        """Rotate queries and keys by position."""
        rotated = self._record("rope", [q, k], [], rope=rope, head_dim=head_dim)
        return rotated[0], rotated[1]

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        layer: int,
        *,
        head_dim: int,
        scale: float,
        window: int,
        softcap: float = 0.0,
        sinks: str | None = None,
    ) -> Value:
        """Write k and v into the pages of `layer`, then attend causally over them; window 0 means all. softcap: scores
        x become softcap * tanh(x / softcap); 0 leaves them. sinks: a weight [heads], scores without a value."""
        heads, kv_heads = int(q.shape[-1]) // head_dim, int(k.shape[-1]) // head_dim
        written = self._one("kv_write", [k, v], [], layer=layer, kv_heads=kv_heads, head_dim=head_dim)
        attrs = {"layer": layer, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        weights = [] if sinks is None else [sinks]
        return self._one("attention", [q, written], weights, **attrs, scale=scale, window=window, softcap=softcap)

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        return self._one("add", [a, b], [])

    def act_mul(self, x: Value, act: str) -> Value:
        """act(left half) * right half; act is "silu" or "gelu_tanh"."""
        return self._one("act_mul", [x], [], act=act)

    def route(
        self,
        logits: Value,
        bias: str | None = None,
        *,
        k: int,
        score: str,
        renormalize: bool = False,
        groups: int = 1,
        kept_groups: int = 1,
        scale: float = 1.0,
    ) -> tuple[Value, Value]:
        """Ids and weights of the k experts of each row. score: "softmax", "sigmoid" or "logits" (softmax among the
        chosen); bias: a weight [experts] added for choosing alone; renormalize: weights are made to add up to 1, before
        `scale`."""
        attrs = {"k": k, "score": score, "renormalize": renormalize, "groups": groups, "kept_groups": kept_groups}
        ids, weights = self._record("route", [logits], [] if bias is None else [bias], **attrs, scale=scale)
        return ids, weights

    def experts(
        self,
        x: Value,
        chosen: tuple[Value, Value],
        gate_up: str,
        down: str,
        biases: tuple[str, str] | None = None,
        *,
        act: str,
        alpha: float = 0.0,
        limit: float = 0.0,
    ) -> Value:
        """The chosen experts' gated MLPs, weighted and added up. chosen: of `route`; biases: of gate_up and of down;
        act: as `act_mul`, or "swiglu_clamped" with its alpha and limit."""
        weights = [gate_up, down, *(biases or ())]
        return self._one("experts", [x, *chosen], weights, act=act, alpha=alpha, limit=limit)

    def softcap(self, x: Value, cap: float) -> Value:
        """cap * tanh(x / cap)."""
        return self._one("softcap", [x], [], cap=cap)

    def select(self, x: Value) -> Value:
        """The rows whose logits are wanted."""
        return self._one("select", [x], [])

    def program(self, **outputs: Value) -> Program:
        """The finished program with its named outputs."""
        read = {name for record in self._records for name in record.weights}
        unread = (self._capture | set(self._adapters)) - read
        if unread:
            raise ValueError(f"no op reads {sorted(unread)}; weights are: {', '.join(sorted(read))}")
        return Program(
            tuple(self._records),
            tuple(self._shapes),
            self._weight_shapes,
            {"tokens": self.tokens.id},
            {name: value.id for name, value in outputs.items()} | self._outputs,
        )

    def _value(self, shape: Shape) -> Value:
        self._shapes.append(shape)
        return Value(len(self._shapes) - 1, shape)

    def _one(self, op: str, inputs: list[Value], weights: list[str], **attrs: Any) -> Value:
        return self._record(op, inputs, weights, **attrs)[0]

    def _record(self, op: str, inputs: list[Value], weights: list[str], **attrs: Any) -> tuple[Value, ...]:
        shapes = OPS[op].infer(tuple(v.shape for v in inputs), tuple(self._weight_shapes[w] for w in weights), attrs)
        outputs = tuple(self._value(shape) for shape in shapes)
        self._records.append(
            Record(op, tuple(v.id for v in inputs), tuple(v.id for v in outputs), tuple(weights), attrs)
        )
        for name in self._capture.intersection(weights):
            self._outputs[f"hidden.{name}"] = inputs[0].id
        return outputs


def record(
    wire: Callable[[Recorder], Value],
    weight_shapes: Mapping[str, tuple[int, ...]],
    adapters: Mapping[str, int] | None = None,
    capture: Iterable[str] = (),
) -> Program:
    """Record a model: `wire(g)` returns the value of the logits."""
    g = Recorder(weight_shapes, adapters, capture)
    return g.program(logits=wire(g))
