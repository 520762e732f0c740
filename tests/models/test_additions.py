"""Adapters and captured states, added while recording: against transformers with the same delta put in by hooks."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch

from tests.parity_tools import Walker, load, oracle_logits, random_prompt
from tokenspeed.program.fuse import fuse

NAMES = ("llama", "qwen2", "qwen3", "gemma3")
RANK = 4


def factors(shape, seed):
    """A [rank, in] and B [out, rank], with a delta about as large as what it is added to."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, shape[1], generator=generator) * shape[1] ** -0.5
    return down, torch.randn(shape[0], RANK, generator=generator) * RANK**-0.5


@contextmanager
def delta_on(modules, down, up):
    """Adds x A^T B^T to the outputs of `modules`, which take consecutive rows of B."""
    with ExitStack() as stack:
        start = 0
        for module in modules:
            rows = up[start : start + module.out_features]
            start += module.out_features
            handle = module.register_forward_hook(lambda _, args, out, rows=rows: out + args[0] @ down.T @ rows.T)
            stack.callback(handle.remove)
        yield


def projections(oracle, name):
    """The transformers modules behind one of our weights."""
    _, layer, weight = name.split(".")
    block = oracle.model.layers[int(layer)]
    attention, mlp = block.self_attn, block.mlp
    return {
        "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
        "o": [attention.o_proj],
        "gate_up": [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }[weight]


def adapter_weights(model, names, seed):
    made = {name: factors(model.definition.weights.specs[name].shape, seed + i) for i, name in enumerate(names)}
    extra = {f"{name}.lora_{'ab'[i]}": values for name, pair in made.items() for i, values in enumerate(pair)}
    return extra, made


@pytest.mark.parametrize("adapted", [["layers.0.qkv"], ["layers.1.o", "layers.0.gate_up", "layers.1.down"]])
@pytest.mark.parametrize("name", NAMES)
def test_adapters(tiny, name, adapted):
    checkpoint = tiny(name, "F32")
    prompt = random_prompt(21, checkpoint.case.seed)
    model = load(checkpoint.path)
    extra, made = adapter_weights(model, adapted, checkpoint.case.seed)
    with ExitStack() as stack:
        for weight, pair in made.items():
            stack.enter_context(delta_on(projections(checkpoint.oracle, weight), *pair))
        expected = oracle_logits(checkpoint.oracle, prompt)
    assert (expected - oracle_logits(checkpoint.oracle, prompt)).abs().max() > 0.1, "the delta must matter"
    program = model.definition.program(adapters=dict.fromkeys(adapted, RANK))
    for variant in (program, fuse(program)):
        torch.testing.assert_close(Walker(model, variant, weights=extra).logits(prompt), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_captured_states(tiny, name):
    checkpoint = tiny(name, "F32")
    prompt = random_prompt(21, checkpoint.case.seed)
    names = ("layers.0.qkv", "layers.1.qkv", "layers.1.down", "layers.1.mlp_norm")
    seen = {}
    with ExitStack() as stack:
        for weight in names[:3]:
            hook = projections(checkpoint.oracle, weight)[0].register_forward_pre_hook(
                lambda _, args, weight=weight: seen.__setitem__(weight, args[0][0])
            )
            stack.callback(hook.remove)
        block = checkpoint.oracle.model.layers[1]
        norm = block.pre_feedforward_layernorm if name == "gemma3" else block.post_attention_layernorm
        hook = norm.register_forward_pre_hook(lambda _, args: seen.__setitem__("layers.1.mlp_norm", args[0][0]))
        stack.callback(hook.remove)
        expected = oracle_logits(checkpoint.oracle, prompt)
    model = load(checkpoint.path)
    program = model.definition.program(capture=names)
    for variant in (program, fuse(program)):
        outputs = Walker(model, variant).feed(prompt)
        assert set(outputs) == {"logits", *(f"hidden.{weight}" for weight in names)}
        torch.testing.assert_close(outputs["logits"], expected, atol=1e-4, rtol=0)
        for weight in names:
            torch.testing.assert_close(outputs[f"hidden.{weight}"], seen[weight], atol=1e-4, rtol=0)


@pytest.mark.parametrize("what", [{"adapters": {"layers.1.gate_up": RANK}}, {"capture": ("layers.1.gate_up",)}])
@pytest.mark.parametrize("name", NAMES)
def test_an_addition_stops_the_fusion_it_breaks_and_no_other(tiny, name, what):
    definition = load(tiny(name, "F32").path).definition

    def op_of_each_weight(program):
        return {weight: record.op for record in fuse(program).records for weight in record.weights}

    ops, changed = op_of_each_weight(definition.program()), op_of_each_weight(definition.program(**what))
    different = {weight for weight in ops if ops[weight] != changed[weight]}
    norms = {"layers.1.mlp_norm", "layers.1.attn_post_norm"} if name == "gemma3" else {"layers.1.mlp_norm"}
    assert different == {"layers.1.gate_up", *norms}
    assert changed["layers.1.gate_up"] == ("linear" if "adapters" in what else "linear_act")
    assert changed["layers.1.mlp_norm"] == ("branch_join_norm" if name == "gemma3" else "join_norm")


def test_captured_state_of_an_adapted_weight(tiny):
    """The delta by hand, inside one program: y = plain y + B A x, with x as captured."""
    checkpoint = tiny("qwen3", "F32")
    model = load(checkpoint.path)
    extra, made = adapter_weights(model, ["layers.0.o"], 9)
    prompt = random_prompt(21, 9)
    capture = ("layers.0.o", "layers.0.mlp_norm")
    plain = Walker(model, model.definition.program(capture=capture)).feed(prompt)
    program = model.definition.program(adapters={"layers.0.o": RANK}, capture=capture)
    adapted = Walker(model, program, weights=extra).feed(prompt)
    down, up = made["layers.0.o"]
    delta = plain["hidden.layers.0.o"] @ down.T @ up.T
    torch.testing.assert_close(
        adapted["hidden.layers.0.mlp_norm"], plain["hidden.layers.0.mlp_norm"] + delta, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("what", [{"adapters": {"layers.9.qkv": RANK}}, {"capture": ("layers.0.q",)}])
def test_a_name_that_no_op_reads_is_refused(tiny, what):
    definition = load(tiny("llama", "F32").path).definition
    with pytest.raises(ValueError, match=r"no op reads.*layers\.[09]"):
        definition.program(**what)
