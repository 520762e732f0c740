"""One model on a GPU: plans per bucket, walked kernel by kernel; whoever calls may capture the walk in a graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from typing import Any

import torch

from tokenspeed.kernels import ref
from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.ops.definitions import Operands
from tokenspeed.program.plan import Plan, Planned, plan
from tokenspeed.program.program import Record
from tokenspeed.quantization.narrow import FORMATS, Narrow, narrow
from tokenspeed.runner.gpu.view import GpuView
from tokenspeed.runner.model import LoadedModel, Progress
from tokenspeed.weights.ahead import brought
from tokenspeed.weights.held import held_modes, hold_weights
from tokenspeed.weights.packed_experts import load_experts, packed_experts
from tokenspeed.weights.placing import place_weights, share

logger = logging.getLogger("tokenspeed")
HOST_REFERENCES = ("experts",)
"""Ops whose reference waits for the device, so no graph can hold it: without a kernel they are refused."""

UNPACKED = "BF16"
"""What kernels are told of a matrix that comes in a layout of which they have no type."""
MEASURED = 100
"""Priority, beyond its own, of what runs instead of a kernel."""


class GpuBackend:
    """Weights in the compute dtype on the device; every record of the program by the fastest kernel that takes it."""

    name = "gpu"
    max_passes = 1

    def __init__(
        self,
        model: LoadedModel,
        progress: Progress | None = None,
        register: Callable[[Registry], None] | None = None,
        quantization: str | None = None,
        batch_invariant: bool = False,
    ) -> None:
        """register: adds the fast kernels; by default Triton's. quantization: a mode of `groups.GPU_MODES` for every
        projection but the head; fp8 makes its activations e4m3 per token, too. batch_invariant: a row's bits depend
        on its own sequence alone.

        Raises UnsupportedError naming an op that has no kernel, of invariant ones in that mode, and no reference that
        a graph can hold."""
        self.model, self.batch_invariant = model, batch_invariant
        narrowed, held = model.projections(quantization), held_modes(model.packed, model.program.head)
        packed = packed_experts(model.packed) - narrowed
        stored = model.stored - packed
        self.formats = model.formats | {name: (FORMATS[str(quantization)],) for name in narrowed}
        self.formats |= dict.fromkeys(stored, (UNPACKED,)) | {name: (FORMATS[held[name]],) for name in held}
        self.formats |= dict.fromkeys(packed, (FORMATS["mxfp4"],))
        _say_unpacked(model, stored - set(held))
        self._registry = Registry()
        (register or _register_kernels)(self._registry)
        self._registry.add(Implementation("rows", "select", "gpu", _select, _always, priority=10, invariant=True))
        self._registry.add(Implementation("softcap", "softcap", "gpu", _softcap, _always, priority=10, invariant=True))
        ref.register(self._registry, but=HOST_REFERENCES)
        self._plans: dict[int, Plan] = {}
        self._before_head = model.program.before_head()
        self.plan_for(1)
        experts = brought({name: model.packed[name] for name in model.packed if name in packed}, model.device)
        self.weights: dict[str, torch.Tensor | Narrow] = {
            name: load_experts(weight, model.device) for name, weight in experts
        }
        others = {name: weight for name, weight in model.packed.items() if name not in held and name not in packed}
        kept = {name: model.packed[name] for name in held}
        first, rest = (sum(weight.nbytes for weight in each.values()) for each in (others, kept))
        # Few of them at a time.
        for name, plain in place_weights(others, model.dtype, model.device, share(progress, 0, first + rest)):
            self.weights[name] = narrow(plain, str(quantization), name) if name in narrowed else plain
        self.weights |= hold_weights(kept, model.device, share(progress, first, first + rest))
        self.weight_bytes = {name: float(weight.nbytes) for name, weight in self.weights.items()}

        shape = model.definition.config
        self.num_heads, self.vocab_size = shape.num_heads, shape.vocab_size

    @property
    def fallback_ops(self) -> list[str]:
        """Ops that the reference runs in the smallest bucket, although they have arithmetic of their own."""
        steps = self.plan_for(1).steps
        slow = [s.record.op for s in steps if s.implementation.backend == "ref" and s.record.op not in ("split",)]
        return list(dict.fromkeys(slow))

    def plan_for(self, tokens: int) -> Plan:
        """The plan for a bucket of `tokens`; made on first use."""
        if tokens not in self._plans:
            self._plans[tokens] = plan(self.model.program, self._registry, self._situation(tokens))
        return self._plans[tokens]

    def run_instead(self, runs: Mapping[str, Callable[..., Any]]) -> None:
        """In plans made from now on, for ops by name, call these where one of the fast kernels would be: for
        measurements. Graphs that were captured before do not change."""
        for op, run in runs.items():
            for own in self._registry.implementations(op):
                if own.backend != "ref":
                    name, priority = f"instead of {own.name}", own.priority + MEASURED
                    self._registry.add(replace(own, name=name, run=run, priority=priority))
        self._plans.clear()

    def _situation(self, tokens: int) -> Situation:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return Situation(self.model.device.type, dtype, tokens, self.formats, self.batch_invariant)

    def forward(self, view: GpuView) -> torch.Tensor:
        """Logits [rows, vocabulary] of the step's rows, in the compute dtype; KV is written on the way.

        The head is planned for its own number of rows, which is smaller than that of tokens when prompts are fed.
        """
        return self.head(view, self.body(view))

    def body(self, view: GpuView) -> dict[int, torch.Tensor]:
        """Everything before the head: what it left for the head, by value."""
        steps, _ = _at_select(self.plan_for(len(view.tokens)).steps)
        values = {self.model.program.inputs["tokens"]: view.tokens}
        self.walk(steps, view, values)
        return values

    def head(self, view: GpuView, values: dict[int, torch.Tensor]) -> torch.Tensor:
        """Logits of the view's rows from what `body` left, which is used up."""
        _, steps = _at_select(self.plan_for(len(view.rows)).steps)
        self.walk(steps, view, values)
        return values[self.model.program.outputs["logits"]]

    def hidden(self, view: GpuView, values: dict[int, torch.Tensor]) -> torch.Tensor:
        """Hidden states [rows, hidden size] after the final norm of the view's rows, from what `body` left, which is
        used up; in the compute dtype."""
        program, situation = self._before_head, self._situation(len(view.rows))
        self.walk(plan(program, self._registry, situation).steps, view, values)
        return values[program.outputs["hidden"]] * self.model.definition.config.logits_divisor

    def walk(self, steps: Sequence[Planned], view: GpuView, values: dict[int, torch.Tensor]) -> None:
        """Run planned records; `values` takes their outputs and loses what is dead."""
        for step in steps:
            record, implementation = step.record, step.implementation
            inputs = [values[v] for v in record.inputs]
            weights = [self.weights[name] for name in record.weights]
            if implementation.backend == "ref":
                outputs = implementation.run(view, inputs, weights, record.attrs)
            else:
                outputs = implementation.run(view, record, inputs, weights)
            values.update(zip(record.outputs, outputs, strict=True))
            for value in step.frees:
                values.pop(value, None)


def _say_unpacked(model: LoadedModel, names: AbstractSet[str]) -> None:
    """Which of a checkpoint's quantised matrices take more memory here than there."""
    larger = [model.packed[name] for name in sorted(names)]
    if larger:
        before, after = sum(w.nbytes for w in larger), sum(prod(w.shape) for w in larger) * model.dtype.itemsize
        logger.warning(
            "%d quantised matrices are unpacked to %s, %.2f GB for %.2f in the files: %s (%s) first; no kernel takes "
            "them as they are",
            len(larger), str(model.dtype).removeprefix("torch."), after / 1e9, before / 1e9, larger[0].spec.name,
            ", ".join(larger[0].formats),
        )  # fmt: skip


def _at_select(steps: Sequence[Planned]) -> tuple[Sequence[Planned], Sequence[Planned]]:
    at = next(i for i, step in enumerate(steps) if step.record.op == "select")
    return steps[:at], steps[at:]


def _select(
    view: GpuView, record: Record, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    if view.one_each and len(view.rows) == len(view.tokens):
        return (inputs[0],)
    return (inputs[0].index_select(0, view.rows.clamp(min=0)),)


def _softcap(
    view: GpuView, record: Record, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    cap = record.attrs["cap"]
    return ((cap * torch.tanh(inputs[0].float() / cap)).to(inputs[0].dtype),)


def _always(operands: Operands, situation: Situation) -> bool:
    return True


def triton_available() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def _register_kernels(registry: Registry) -> None:
    # Triton is an optional package.
    from tokenspeed.kernels.cuda import registration as cuda_registration
    from tokenspeed.kernels.triton import attention_registration, dense, expert_registration, invariant_registration

    attention_registration.register(registry)
    invariant_registration.register(registry)
    dense.register(registry)
    expert_registration.register(registry)
    cuda_registration.register(registry)
