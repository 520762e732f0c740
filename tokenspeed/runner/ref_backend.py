"""The `ref` backend: a loop over the plan, each op by its torch reference. Runs every model on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenspeed.kernels import ref
from tokenspeed.kernels.registry import Registry, Situation
from tokenspeed.ops.reference import StepView
from tokenspeed.program.plan import Plan, Planned, bucket_of, plan
from tokenspeed.quantization.narrow import narrow
from tokenspeed.runner.arena import Arena
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.inputs import FedRow, step_view
from tokenspeed.runner.model import LoadedModel, Progress
from tokenspeed.weights.placing import place_weights


class RefBackend:
    """Weights unpacked once: matrices [rows, cols] in the compute dtype, vectors in float32."""

    name = "ref"
    max_passes = 1

    def __init__(
        self,
        model: LoadedModel,
        fallback_ops: Sequence[str] = (),
        progress: Progress | None = None,
        quantization: str | None = None,
    ) -> None:
        """quantization: a mode of `groups.GPU_MODES`, whose values the projections but the head then have."""
        self._model = model
        self._arena: Arena | None = None
        self.fallback_ops = list(fallback_ops)
        self.weights = dict(place_weights(model.packed, model.dtype, model.device, progress))
        for name in sorted(model.projections(quantization)):
            self.weights[name] = narrow(self.weights[name], str(quantization), name).dequantized(model.dtype)
        self.weight_bytes = {name: float(w.numel() * w.element_size()) for name, w in self.weights.items()}
        self._registry = Registry()
        ref.register(self._registry)
        self._plans: dict[int, Plan] = {}
        self._before_head = model.program.before_head()
        self._view: StepView | None = None
        self._values: dict[int, torch.Tensor] = {}
        self._head: tuple[Planned, ...] = ()

    def bind(self, arena: Arena) -> None:
        """Use an arena's pages."""
        self._arena = arena

    def plan_for(self, tokens: int) -> Plan:
        """The plan of the bucket that holds `tokens`; made on first use."""
        bucket = bucket_of(tokens)
        if bucket not in self._plans:
            dtype = str(self._model.dtype).removeprefix("torch.")
            situation = Situation(self._model.device.type, dtype, bucket, self._model.formats)
            self._plans[bucket] = plan(self._model.program, self._registry, situation)
        return self._plans[bucket]

    def decode(self, fed: Sequence[FedRow], asks: Sequence[SampledRow], most: int) -> list[list[int]]:
        return []

    def body(self, fed: Sequence[FedRow]) -> None:
        assert self._arena is not None
        self._view = step_view(self._arena, fed)
        steps = self.plan_for(len(self._view.tokens)).steps
        head = next(i for i, step in enumerate(steps) if step.record.op == "select")
        self._head = steps[head:]
        self._values = {self._model.program.inputs["tokens"]: self._view.tokens}
        self.walk(steps[:head], self._view, self._values)

    def pick(self, rows: Sequence[int], asks: Sequence[SampledRow]) -> list[int] | None:
        return None

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        assert self._view is not None
        self._view.rows = torch.tensor(rows, dtype=torch.int64, device=self._model.device)
        values = dict(self._values)
        self.walk(self._head, self._view, values)
        return values[self._model.program.outputs["logits"]].float()

    def hidden(self, rows: Sequence[int]) -> torch.Tensor:
        assert self._view is not None
        self._view.rows = torch.tensor(rows, dtype=torch.int64, device=self._model.device)
        values = dict(self._values)
        dtype = str(self._model.dtype).removeprefix("torch.")
        situation = Situation(self._model.device.type, dtype, bucket_of(len(rows)), self._model.formats)
        self.walk(plan(self._before_head, self._registry, situation).steps, self._view, values)
        return values[self._before_head.outputs["hidden"]].float() * self._model.definition.config.logits_divisor

    def walk(self, steps: tuple[Planned, ...], view: StepView, values: dict[int, torch.Tensor]) -> None:
        """Run planned records; `values` takes their outputs and loses what is dead."""
        for step in steps:
            record = step.record
            inputs = [values[v] for v in record.inputs]
            weights = [self.weights[name] for name in record.weights]
            outputs = step.implementation.run(view, inputs, weights, record.attrs)
            values.update(zip(record.outputs, outputs, strict=True))
            for value in step.frees:
                del values[value]
