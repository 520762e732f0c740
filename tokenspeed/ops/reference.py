"""The torch reference of every plain op: short, obvious, right. Fast kernels are tested against these.

A reference is called as fn(view, inputs, weights, attrs) and returns a tuple of tensors. Activations have the compute
dtype [tokens, columns]; norm weights are float32; reductions run in float32, of float64 in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from tokenspeed.ops.definitions import UNSCALED, Attrs, KvScale
from tokenspeed.ops.kv import decode, encode
from tokenspeed.ops.rope import Rope

Tensors = tuple[torch.Tensor, ...]


def wide(x: torch.Tensor) -> torch.Tensor:
    """In the type that reductions run in."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass
class StepView:
    """What a step's ops see besides activations. T tokens of S sequences, packed one sequence after the other.

    tokens, positions: int64 [T]. query_start: S + 1 offsets into T. context: per sequence, KV entries after this step.
    places: per layer its page group and its index in it.
    kv: [pages, layers per group, 2, page_size, kv_heads, entry], entries as in `ops.kv`.
    slots: int64 [groups, T]; page * page_size + offset of the token's own KV entry.
    block_tables: per sequence and group int64 [pages]; entries behind the group's window may be -1.
    rows: int64 [R], the tokens whose logits are wanted.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: list[int]
    context: list[int]
    block_tables: list[list[torch.Tensor]]
    places: tuple[tuple[int, int], ...]
    kv: torch.Tensor
    rows: torch.Tensor
    angles: dict[tuple[Rope, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def rotation(self, rope: Rope, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of this step's positions, scaled, [T, 1, dim/2] each; computed once per step and rope."""
        key = (rope, dtype)
        if key not in self.angles:
            frequency = frequencies(rope, self.positions.device)
            angle = self.positions.float()[:, None, None] * frequency
            self.angles[key] = ((angle.cos() * rope.scale).to(dtype), (angle.sin() * rope.scale).to(dtype))
        return self.angles[key]


def frequencies(rope: Rope, device: torch.device) -> torch.Tensor:
    """Radians per position of each rotated pair, float32 [dim/2]."""
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim
    frequency = 1.0 / rope.theta**exponent
    if rope.divisors:
        frequency = frequency / torch.tensor(rope.divisors, dtype=torch.float32, device=device)
    return frequency


def embed(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    rows = F.embedding(inputs[0], weights[0])
    if attrs["scale"] == 1.0:
        return (rows,)
    # The scale is rounded to the compute dtype first, as Gemma was trained.
    return (rows * torch.tensor(attrs["scale"], dtype=rows.dtype, device=rows.device),)


def norm(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    """x / sqrt(mean(x^2) + eps) * w (arXiv:1910.07467), per row or per head."""
    x, width = inputs[0], attrs["per_head"] or inputs[0].shape[-1]
    rows = wide(x.reshape(*x.shape[:-1], -1, width))
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + attrs["eps"]) * weights[0]
    return (rows.to(x.dtype).reshape(x.shape),)


def linear(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    bias = weights[1].to(inputs[0].dtype) if len(weights) > 1 else None
    return (F.linear(inputs[0], weights[0], bias),)


def split(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    return tuple(inputs[0].split(list(attrs["sizes"]), dim=-1))


def rope(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    """Rotary position embedding (arXiv:2104.09864) of queries and keys, halves paired."""
    cos, sin = view.rotation(attrs["rope"], inputs[0].dtype)
    return tuple(_rotate(x, cos, sin, attrs["head_dim"]) for x in inputs)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> torch.Tensor:
    half = cos.shape[-1]
    heads = x.reshape(x.shape[0], -1, head_dim)
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).reshape(x.shape)


def kv_write(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    group, index = view.places[attrs["layer"]]
    layer = view.kv[:, index]
    page_size = layer.shape[2]
    pages, offsets = view.slots[group] // page_size, view.slots[group] % page_size
    scale: KvScale = attrs.get("kv_scale", UNSCALED)
    for which, (x, inverse) in enumerate(zip(inputs, (scale.key_inverse, scale.value_inverse), strict=True)):
        heads = x.reshape(x.shape[0], attrs["kv_heads"], attrs["head_dim"])
        entries = encode(heads if inverse == 1 else wide(heads) * inverse, layer.dtype)
        layer.view(torch.uint8)[pages, which, offsets] = entries.view(torch.uint8)
    return (layer,)


def attention(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    """softmax(q k^T * scale) v per sequence over its pages; query at position p sees p - window + 1 .. p. With a
    softcap c, scores x are c * tanh(x / c) (arXiv:2408.00118); sinks join the softmax (arXiv:2309.17453)."""
    query, layer = inputs
    scale: KvScale = attrs.get("kv_scale", UNSCALED)
    attrs = {**attrs, "scale": attrs["scale"] * scale.key}
    group, _ = view.places[attrs["layer"]]
    out = torch.empty_like(query)
    for i, context in enumerate(view.context):
        start, end = view.query_start[i], view.query_start[i + 1]
        q = query[start:end].reshape(end - start, attrs["heads"], attrs["head_dim"])
        attended = _attend(q, layer, view.block_tables[i][group], context, attrs, weights[0] if weights else None)
        out[start:end] = attended.reshape(end - start, -1)
    return (out if scale.value == 1 else (wide(out) * scale.value).to(out.dtype),)


def _attend(
    q: torch.Tensor, layer: torch.Tensor, table: torch.Tensor, context: int, attrs: Attrs, sinks: torch.Tensor | None
) -> torch.Tensor:
    page_size, window = layer.shape[2], attrs["window"]
    first_query = context - q.shape[0]
    first_page = max(0, first_query - window + 1) // page_size if window else 0
    pages = layer.view(torch.uint8)[table[first_page : -(-context // page_size)]].view(layer.dtype)
    entries = pages.transpose(0, 1).flatten(1, 2)[:, : context - first_page * page_size]
    keys, values = decode(entries, attrs["head_dim"], q.dtype).transpose(1, 2)
    mask = None
    if q.shape[0] > 1 or window:
        at = torch.arange(first_query, context, device=q.device)[:, None]
        seen = torch.arange(first_page * page_size, context, device=q.device)
        mask = (seen <= at) & (seen > at - window) if window else seen <= at
    if attrs["softcap"] or sinks is not None:
        return _attend_by_hand(q, keys, values, mask, attrs, sinks)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None], values[None], mask, scale=attrs["scale"], enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _attend_by_hand(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    attrs: Attrs,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [tokens, heads, dim], keys and values [kv_heads, context, dim], mask [tokens, context], sinks [heads]; in
    float32."""
    grouped = wide(q.transpose(0, 1).unflatten(0, (attrs["kv_heads"], -1)))
    scores = grouped @ wide(keys).transpose(1, 2)[:, None] * attrs["scale"]
    if attrs["softcap"]:
        scores = attrs["softcap"] * torch.tanh(scores / attrs["softcap"])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(attrs["kv_heads"], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    out = scores.softmax(-1)[..., : keys.shape[1]] @ wide(values)[:, None]
    return out.flatten(0, 1).transpose(0, 1).to(q.dtype)


def add(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    return (inputs[0] + inputs[1],)


def act_mul(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    return (gated(inputs[0], attrs),)


def softcap(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    """cap * tanh(x / cap), in float32."""
    return ((attrs["cap"] * torch.tanh(wide(inputs[0]) / attrs["cap"])).to(inputs[0].dtype),)


def route(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    """The k best experts of each row and their weights, in float32; of equal ones those of lower ids.

    score "softmax": probabilities among all experts; "sigmoid": each expert's own (arXiv:2412.19437); "logits":
    softmax among the chosen ones alone. A bias is added for choosing alone. Of more than one group of neighbours the
    `kept_groups` best take part; a group's score is that of its best expert, of sigmoids the sum of its two best.
    """
    choice = choices(inputs[0], weights, attrs)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[..., : attrs["k"]]
    return ids.int(), shares_of(inputs[0], ids, attrs)


def choices(logits: torch.Tensor, weights: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    """What experts are chosen by [T, E]: their scores with the bias, -inf in groups that take no part."""
    scores = _scores(wide(logits), attrs["score"])
    choice = scores + weights[0].float() if weights else scores
    return _in_best_groups(choice, attrs) if attrs["groups"] > 1 else choice


def shares_of(logits: torch.Tensor, ids: torch.Tensor, attrs: Attrs) -> torch.Tensor:
    """The weights [T, k] of the experts `ids`, int64 [T, k]."""
    chosen = _scores(wide(logits), attrs["score"]).gather(-1, ids)
    if attrs["score"] == "logits":
        chosen = chosen.softmax(-1)
    elif attrs["renormalize"]:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * attrs["scale"]


def _scores(logits: torch.Tensor, score: str) -> torch.Tensor:
    if score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if score == "sigmoid" else logits


def _in_best_groups(choice: torch.Tensor, attrs: Attrs) -> torch.Tensor:
    groups = choice.unflatten(-1, (attrs["groups"], -1))
    summed = min(2 if attrs["score"] == "sigmoid" else 1, groups.shape[-1])
    scores = groups.topk(summed, dim=-1).values.sum(-1)
    kept = scores.sort(dim=-1, descending=True, stable=True).indices[..., : attrs["kept_groups"]]
    left_out = torch.ones_like(scores, dtype=torch.bool).scatter(-1, kept, False)
    return groups.masked_fill(left_out[..., None], -torch.inf).flatten(-2)


def experts(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    """Expert by expert over the rows that chose it; rows are added up in float32."""
    x, ids, shares = inputs
    gate_up, down, *biases = weights
    out = torch.zeros(x.shape, dtype=wide(x[:0]).dtype, device=x.device)
    for expert in ids.unique().tolist():
        rows, places = (ids == expert).nonzero(as_tuple=True)
        first, second = (bias[expert].to(x.dtype) for bias in biases) if biases else (None, None)
        hidden = gated(F.linear(x[rows], gate_up[expert], first), attrs)
        y = wide(F.linear(hidden, down[expert], second))
        out.index_add_(0, rows, y * shares[rows, places, None])
    return (out.to(x.dtype),)


def gated(gate_up: torch.Tensor, attrs: Attrs) -> torch.Tensor:
    """act(left half) * right half. swiglu_clamped: gate * sigmoid(alpha * gate) * (up + 1), with the gate cut at
    `limit` and up at both ends (gpt-oss's model card)."""
    gate, up = gate_up.chunk(2, dim=-1)
    if attrs["act"] == "swiglu_clamped":
        gate, up = gate.clamp(max=attrs["limit"]), up.clamp(-attrs["limit"], attrs["limit"])
        return gate * torch.sigmoid(attrs["alpha"] * gate) * (up + 1)
    return (F.silu(gate) if attrs["act"] == "silu" else F.gelu(gate, approximate="tanh")) * up


def select(view: StepView, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], attrs: Attrs) -> Tensors:
    return (inputs[0].index_select(0, view.rows),)


Reference = Callable[[StepView, Sequence[torch.Tensor], Sequence[torch.Tensor], Attrs], Tensors]
REFERENCE: dict[str, Reference] = {
    fn.__name__: fn
    for fn in (embed, norm, linear, split, rope, kv_write, attention, add, act_mul, softcap, route, experts, select)
}
