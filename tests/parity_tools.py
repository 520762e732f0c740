"""Tiny random checkpoints of every family, as safetensors and GGUF, beside the transformers models they hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as GGMLType
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.parity_cases import CASES, CONTEXT, FAMILY_CASES, PROMPT_LENGTHS, VOCAB, Case
from tokenspeed.config.engine import EngineConfig
from tokenspeed.ops.reference import StepView
from tokenspeed.program.program import Program
from tokenspeed.runner.arena import Arena, PageShape
from tokenspeed.runner.build import open_model
from tokenspeed.runner.layout import page_layout
from tokenspeed.runner.model import LoadedModel, load_model
from tokenspeed.runner.ref_backend import RefBackend

__all__ = ["CASES", "CONTEXT", "FAMILY_CASES", "PROMPT_LENGTHS", "VOCAB"]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
K_FORMATS = ("Q4_K", "Q6_K")
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
}
TURNED = ("gpt_oss",)
"""Families that keep experts' matrices transposed, gate and up columns by turns."""
PLUS_ONE = ("gemma2", "gemma3_text")
"""Families whose norms multiply by 1 + w."""
INTERLEAVED = ("llama", "mistral", "smollm3", "granite", "mixtral")
"""Families whose converter interleaves rows of Q and K heads."""


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk, and the transformers model (float32, eager attention) that holds the same values."""

    case: Case
    path: Path
    oracle: PreTrainedModel


def random_oracle(case: Case, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """A float32 model with every parameter random, scaled so that activations and logits are of order 1. auto: the
    class of transformers that chooses its head."""
    config = AutoConfig.for_model(case.model_type, **case.settings)
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, values in learned(model):
            if values.dim() == 3:
                rows = 1 if case.model_type in TURNED else 2
                values.normal_(0, values.shape[rows] ** -0.5, generator=generator)
            elif values.dim() == 2 and not name.endswith("bias"):
                # A head tied to a large embedding would only repeat the last token.
                scale = 0.4 if config.tie_word_embeddings and "embed_tokens" in name else 1.0
                values.normal_(0, scale * values.shape[1] ** -0.5, generator=generator)
            elif name.endswith("norm.weight"):
                centre = 0.0 if case.model_type in PLUS_ONE else 1.0
                values.uniform_(centre - 0.5, centre + 0.5, generator=generator)
            else:
                values.normal_(0, 0.5, generator=generator)
    return model


def learned(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that a checkpoint holds, by its name in transformers."""
    yield from model.named_parameters()
    yield from ((name, values) for name, values in model.named_buffers() if name.endswith("correction_bias"))


def oracle_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """float32 [tokens, vocabulary]."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0]


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids, uniform over the vocabulary."""
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_safetensors(
    case: Case, dtype: str, folder: Path, max_shard_size: str = "1GB", auto: Any = AutoModelForCausalLM
) -> Tiny:
    """Saved in `dtype` by save_pretrained; the oracle holds the rounded values. auto: as above."""
    oracle = random_oracle(case, auto)
    with torch.no_grad():
        for _, values in learned(oracle):
            values.copy_(values.to(DTYPES[dtype]))
    # A copy is cast: a model cast back and forth would keep rounded rotary frequencies.
    stored = copy.deepcopy(oracle)
    torch.nn.Module.to(stored, DTYPES[dtype])
    stored.save_pretrained(folder, max_shard_size=max_shard_size)
    return Tiny(case, folder, oracle)


def make_gguf(case: Case, fmt: str, path: Path, split_max_tensors: int = 0) -> Tiny:
    """Written by the gguf package, named by its name map; the oracle gets back what its `dequantize` reads.

    fmt: a format for all matrices; "K" mixes Q4_K and Q6_K, and Q5_0 where a width is no multiple of 256.
    split_max_tensors: above 0, writes shards of so many tensors, and gives the first one's path.
    """
    oracle = random_oracle(case)
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[case.model_type]]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    _add_metadata(writer, case, oracle)
    rng = np.random.default_rng(case.seed)
    with torch.no_grad():
        for gguf_name, values in gguf_tensors(case, oracle):
            kind, data = _encode(values.contiguous().numpy(), gguf_name, fmt, rng)
            read = gguf.dequantize(data.reshape(-1, data.shape[-1]), kind)
            values.copy_(torch.from_numpy(read.reshape(values.shape)))
            writer.add_tensor(gguf_name, _as_stored(case, gguf_name, data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tiny(case, min(path.parent.glob(f"{path.stem}-*.gguf")) if split_max_tensors else path, oracle)


def gguf_tensors(case: Case, oracle: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a GGUF file with their names, as views of the oracle's own values."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[case.model_type], case.settings["num_hidden_layers"])
    for name, values in learned(oracle):
        layer, _, part = name.removeprefix("model.layers.").partition(".mlp.experts.")
        if part:
            for ours, view in expert_views(part, values, case.model_type in TURNED):
                yield f"blk.{layer}.ffn_{ours}", view
            continue
        if name.endswith("sinks"):
            name += ".weight"
        known = name.replace("mlp.e_score", "block_sparse_moe.e_score").replace("correction_bias", "correction.bias")
        gguf_name = names.get_name(known, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        yield gguf_name, values


def expert_views(part: str, values: torch.Tensor, turned: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts' values by what GGUF calls them. turned: as gpt-oss has them, gate and up columns by turns."""
    suffix = ".bias" if part.endswith("_bias") else ".weight"
    if turned and suffix == ".weight":
        values = values.transpose(1, 2)
    if part.startswith("down"):
        yield f"down_exps{suffix}", values
        return
    halves = (values[:, 0::2], values[:, 1::2]) if turned else values.chunk(2, dim=1)
    for name, half in zip(("gate", "up"), halves, strict=True):
        yield f"{name}_exps{suffix}", half


Array = npt.NDArray[Any]


def _encode(values: Array, gguf_name: str, fmt: str, rng: np.random.Generator) -> tuple[GGMLType, Array]:
    """Type and bytes of a tensor: vectors stay F32; K-quants are drawn, as the gguf package cannot quantise to them."""
    if values.ndim == 1 or gguf_name.endswith(".bias"):
        return GGMLType.F32, values.copy()
    if fmt == "K":
        fmt = "Q6_K" if any(part in gguf_name for part in ("attn_v", "token_embd", "output.")) else "Q4_K"
        fmt = "Q5_0" if values.shape[-1] % 256 else fmt
    kind, rows = GGMLType[fmt], values.reshape(-1, values.shape[-1])
    data = random_k_rows(fmt, rows, rng) if fmt in K_FORMATS else gguf.quantize(rows, kind)
    return kind, data.reshape(*values.shape[:-1], -1)


def random_k_rows(fmt: str, like: Array, rng: np.random.Generator) -> Array:
    """Random valid blocks, uint8 [rows, bytes]: every bit random but those of the float16 factors.

    The factors give values about the standard deviation of `like` [rows, cols], and those of Q4_K a mean of about 0.
    """
    elements, size = gguf.GGML_QUANT_SIZES[GGMLType[fmt]]
    blocks = rng.integers(0, 256, (like.size // elements, size), dtype=np.uint8)
    spread = like.std() * rng.uniform(0.5, 1.5, len(blocks))
    factors = {0: spread / 256, 2: 7.5 * spread / 256} if fmt == "Q4_K" else {208: spread / 1365}
    for at, factor in factors.items():
        blocks[:, at : at + 2] = factor.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(len(like), -1)


def _as_stored(case: Case, gguf_name: str, data: Array) -> Array:
    """What llama.cpp's converter does to values: Gemma's norms get their +1, Llama's Q and K rows are interleaved."""
    if case.model_type in PLUS_ONE and data.ndim == 1:
        return data + np.float32(1)
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    key = heads.get(gguf_name.split(".", 2)[-1].rpartition(".")[0])
    if case.model_type in INTERLEAVED and key is not None:
        return interleave_heads(data, case.settings[key])
    return data


def interleave_heads(rows: Array, heads: int) -> Array:
    """Rows of each head from (first half, second half) to pairs (one of each)."""
    half = rows.shape[0] // heads // 2
    order = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in range(2)]
    return np.ascontiguousarray(rows[order])


def _add_metadata(writer: gguf.GGUFWriter, case: Case, oracle: PreTrainedModel) -> None:
    config = oracle.config.to_dict()
    writer.add_name(case.name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0))
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = case.settings["head_dim"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config["rope_parameters"]
    if case.model_type == "gemma3_text":
        if not case.implied_keys:
            writer.add_sliding_window_pattern(3)
            writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if case.model_type in ("gemma2", "gemma3_text", "phi3", "gpt_oss"):
        writer.add_sliding_window(config["sliding_window"] or 0)
    if case.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if case.model_type == "granite":
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if case.model_type in (*INTERLEAVED, "phi3", "glm4", "glm4_moe", "minimax_m2"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if "num_experts_per_tok" in config:
        _add_experts(writer, case.model_type, config)
    _add_rope(writer, rope, oracle, head_dim)


def _add_experts(writer: gguf.GGUFWriter, model_type: str, config: dict[str, Any]) -> None:
    writer.add_expert_count(config.get("n_routed_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if model_type in ("qwen3_moe", "glm4_moe"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if model_type in ("glm4_moe", "minimax_m2"):
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if model_type == "glm4_moe":
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_nextn_predict_layers(config["num_nextn_predict_layers"])


def _add_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], oracle: PreTrainedModel, head_dim: int) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(oracle, head_dim))
    if rope["rope_type"] == "longrope":
        _, scale = ROPE_INIT_FUNCTIONS["longrope"](oracle.config, torch.device("cpu"))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(scale)
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))


def _llama3_divisors(oracle: PreTrainedModel, head_dim: int) -> Array:
    """The converter's `rope_freqs`: plain frequencies over those that transformers computes. float32 [head_dim / 2]."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](oracle.config, torch.device("cpu"))
    theta = oracle.config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / scaled.double()).float().numpy()


def load(path: Path, dtype: str = "float32", length: int | None = None) -> LoadedModel:
    """The engine's own reading of a checkpoint, for sequences of up to `length` tokens."""
    config = EngineConfig(model=str(path), device="cpu", dtype=dtype, max_model_len=length)
    files = open_model(config)
    return load_model(files.definition, files.checkpoint, config)


class Walker:
    """Runs a program as the reference backend plans it, for one sequence, and gives the logits of every position."""

    def __init__(
        self,
        model: LoadedModel,
        program: Program | None = None,
        page_size: int = 4,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """program: instead of the model's own (fused) one. weights: beside or instead of the model's own."""
        self.model = model if program is None else replace(model, program=program)
        config, self.page_size = model.definition.config, page_size
        layout = page_layout(config.windows)
        shape = PageShape(layout, page_size, config.num_kv_heads, config.head_dim, model.dtype)
        groups, entries = len(layout.windows), -(-CONTEXT // page_size)
        self.arena = Arena(groups * entries, shape, model.device)
        self.arena.kv.view(torch.uint8).fill_(0xFF)  # what is read before it is written shows in the logits
        order = torch.randperm(groups * entries, generator=torch.Generator().manual_seed(entries))
        self.tables = list(order.view(groups, entries))
        self.backend = RefBackend(self.model)
        self.backend.weights |= dict(weights or {})

    def feed(self, token_ids: list[int], start: int = 0) -> dict[str, torch.Tensor]:
        """Outputs by name, [tokens, columns] each, for tokens at positions start..; earlier ones were fed before."""
        positions = torch.arange(start, start + len(token_ids))
        entries, offsets = positions // self.page_size, positions % self.page_size
        view = StepView(
            tokens=torch.tensor(token_ids),
            positions=positions,
            slots=torch.stack([table[entries] * self.page_size + offsets for table in self.tables]),
            query_start=[0, len(token_ids)],
            context=[start + len(token_ids)],
            block_tables=[self.tables],
            places=self.arena.shape.layout.places,
            kv=self.arena.kv,
            rows=torch.arange(len(token_ids)),
        )
        program = self.model.program
        values = {program.inputs["tokens"]: view.tokens}
        with torch.inference_mode():
            self.backend.walk(self.backend.plan_for(len(token_ids)).steps, view, values)
        return {name: values[v] for name, v in program.outputs.items()}

    def logits(self, token_ids: list[int], chunk: int | None = None) -> torch.Tensor:
        """Logits of every position, fed in chunks: [tokens, vocabulary]."""
        size = chunk or len(token_ids)
        parts = [self.feed(token_ids[at : at + size], at)["logits"] for at in range(0, len(token_ids), size)]
        return torch.cat(parts)


def routing_margin(model: PreTrainedModel, token_ids: list[int]) -> float:
    """The least distance, over all tokens and layers with experts, of what was chosen to what was just left out: of
    scores, of sigmoids with their bias, of groups. Below a backend's error its tokens may go to other experts."""
    seen: list[tuple[torch.nn.Module, torch.Tensor, tuple[torch.Tensor, ...]]] = []
    routers = [module for name, module in model.named_modules() if name.endswith(("mlp.gate", "mlp.router"))]
    hooks = [
        module.register_forward_hook(lambda module, args, out: seen.append((module, out[0], args[1:])))
        for module in routers
    ]
    oracle_logits(model, token_ids)
    for hook in hooks:
        hook.remove()
    return min((_margin(*each) for each in seen), default=torch.inf)


def _margin(router: Any, logits: torch.Tensor, biases: tuple[torch.Tensor, ...]) -> float:
    own = dict(router.named_buffers()).get("e_score_correction_bias")
    bias = biases[0] if biases else own
    choice = logits if bias is None else logits.sigmoid() + bias
    groups, kept = (vars(router).get(name, 1) for name in ("num_group", "topk_group"))
    margins = []
    if kept < groups:
        parts = choice.unflatten(-1, (groups, -1))
        best = parts.topk(2, dim=-1).values.sum(-1).sort(dim=-1, descending=True)
        margins.append(best.values[:, kept - 1] - best.values[:, kept])
        out = torch.ones_like(best.values, dtype=torch.bool).scatter(-1, best.indices[:, :kept], False)
        choice = parts.masked_fill(out[..., None], -torch.inf).flatten(-2)
    ranked = choice.sort(dim=-1, descending=True).values
    if router.top_k < ranked.shape[-1]:
        margins.append(ranked[:, router.top_k - 1] - ranked[:, router.top_k])
    return min((float(margin.min()) for margin in margins), default=torch.inf)
