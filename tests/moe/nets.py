"""Mixtures for the tests: small modules of somebody's own, and tiny Hugging Face models from their configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gateplug as gp
from gateplug.moe.routing import ExpertGate


class MoENet(nn.Module):
    """Rows of a digit as tokens, mixtures with a residual, a mean, a head."""

    def __init__(self, *gates: ExpertGate, checkpointing: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layers = nn.ModuleList([gp.MoE(gp.ExpertMLP(gate.experts, 16, 24), gate, **kwargs) for gate in gates])
        self.head = nn.Linear(16, 10)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = x + checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = x + layer(x)
        return self.head(x.mean(1))


_COMMON = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _llama_like(name: str, shape: dict[str, Any], **kwargs: Any) -> nn.Module:
    config = getattr(hf, f"{name}Config")(**{**_COMMON, **shape, **kwargs})
    return getattr(hf, f"{name}ForCausalLM")(config)


def _llama4(**kwargs: Any) -> nn.Module:
    shape = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 32, "head_dim": 8}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**{**_COMMON, **shape, "interleave_moe_layer_step": 1, **kwargs}))


def _switch(**kwargs: Any) -> nn.Module:
    settings = {
        "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0,
    }  # fmt: skip
    return hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**{**settings, **kwargs}))


_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEP = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

FAMILIES: dict[str, tuple[Callable[..., nn.Module], list[str], int, int]] = {
    "Mixtral": (lambda **k: _llama_like("Mixtral", {**_FOUR}, **k), ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"], 4, 2),
    "Qwen2Moe": (
        lambda **k: _llama_like("Qwen2Moe", {**_QWEN, "shared_expert_intermediate_size": 16}, **k),
        ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"], 4, 2,
    ),
    "Qwen3Moe": (lambda **k: _llama_like("Qwen3Moe", {**_QWEN, "head_dim": 8}, **k), ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"], 4, 2),
    "Olmoe": (
        lambda **k: _llama_like("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, **k),
        ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"], 4, 2,
    ),
    "DeepseekV3": (lambda **k: _llama_like("DeepseekV3", {**_DEEP, **_MLA}, **k), ["model.layers.1.mlp.gate"], 4, 2),
    "Glm4Moe": (lambda **k: _llama_like("Glm4Moe", {**_DEEP, "head_dim": 8}, **k), ["model.layers.1.mlp.gate"], 4, 2),
    "GptOss": (
        lambda **k: _llama_like("GptOss", {**_FOUR, "head_dim": 8, "layer_types": ["full_attention"] * 2}, **k),
        ["model.layers.0.mlp.router", "model.layers.1.mlp.router"], 4, 2,
    ),
    "Phimoe": (lambda **k: _llama_like("Phimoe", {**_FOUR}, **k), ["model.layers.0.mlp.router", "model.layers.1.mlp.router"], 4, 2),
    "GraniteMoe": (
        lambda **k: _llama_like("GraniteMoe", {**_FOUR}, **k),
        ["model.layers.0.block_sparse_moe.router", "model.layers.1.block_sparse_moe.router"], 4, 2,
    ),
    "Ernie4_5_Moe": (
        lambda **k: _llama_like("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0, "moe_num_shared_experts": 1}, **k),
        ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"], 4, 2,
    ),
    "Jamba": (
        lambda **k: _llama_like("Jamba", {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False}, **k),
        ["model.layers.0.feed_forward.router", "model.layers.1.feed_forward.router"], 4, 2,
    ),
    "Llama4": (_llama4, ["model.layers.0.feed_forward.router", "model.layers.1.feed_forward.router"], 4, 1),
    "Switch": (_switch, ["encoder.block.1.layer.1.mlp.router", "decoder.block.1.layer.2.mlp.router"], 4, 1),
}  # fmt: skip
"""Family -> (a tiny model from its config, names of its routers, experts, k)."""


def ids(rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    """A batch of token ids whose second half of rows is padded from the middle on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, 64, (rows, length), generator=generator)
    mask = torch.ones_like(x)
    mask[rows // 2 :, length // 2 :] = 0
    return {"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}
