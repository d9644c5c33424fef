"""Tiny classifiers of each family, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Batch = dict[str, Tensor] | tuple[Tensor, ...]

_VISION = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8,
    "patch_size": 4, "num_channels": 1, "num_labels": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 24, "num_labels": 4, "pad_token_id": 0,
}  # fmt: skip


class Stacked(nn.Module):
    """Somebody's own network: blocks in a list, run on tokens."""

    def __init__(self, residual: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(16, 4)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x) if self.residual else block(x)
        return self.head(x.mean(1))


class Pairs(nn.Module):
    """Blocks that return a tuple, as those of older releases do."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.linear(x).tanh(), None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(3)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return self.head(x)


def images(rows: int) -> Batch:
    return {"pixel_values": torch.randn(rows, 1, 8, 8)}


def texts(rows: int) -> Batch:
    """Up to 9 tokens, padded."""
    lengths = torch.tensor([9, 4, 7, 1, 9, 2, 5, 8])[torch.arange(rows) % 8]
    mask = (torch.arange(9) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 32, (rows, 9)) * mask, "attention_mask": mask}


def _resnet() -> nn.Module:
    config = hf.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], layer_type="basic", num_labels=4
    )
    return hf.ResNetForImageClassification(config)


def _gpt2(attention: str) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=24, num_labels=4, pad_token_id=0, attn_implementation=attention
    )
    return hf.GPT2ForSequenceClassification(config)


def _distil() -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=32, dim=16, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=24, num_labels=4, pad_token_id=0
    )
    return hf.DistilBertForSequenceClassification(config)


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(12, 12, 3, stride=2, padding=1), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(48, 4),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch], list[str], list[int | None]]] = {
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VISION)), images, [f"vit.layers.{i}" for i in range(3)], [16] * 3),
    "deit": (lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**_VISION)), images, [f"deit.layers.{i}" for i in range(3)], [16] * 3),
    "deit_with_teacher": (
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**_VISION)),
        images, [f"deit.layers.{i}" for i in range(3)], [16] * 3,
    ),
    "bert": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
        texts, [f"bert.encoder.layer.{i}" for i in range(3)], [16] * 3,
    ),
    "bert_eager": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, attn_implementation="eager")),
        texts, [f"bert.encoder.layer.{i}" for i in range(3)], [16] * 3,
    ),
    "roberta": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
        texts, [f"roberta.encoder.layer.{i}" for i in range(3)], [16] * 3,
    ),
    "distilbert": (_distil, texts, [f"distilbert.transformer.layer.{i}" for i in range(3)], [16] * 3),
    "gpt2": (lambda: _gpt2("sdpa"), texts, [f"transformer.h.{i}" for i in range(3)], [16] * 3),
    "gpt2_eager": (lambda: _gpt2("eager"), texts, [f"transformer.h.{i}" for i in range(3)], [16] * 3),
    "resnet": (_resnet, images, [f"resnet.encoder.stages.{i}" for i in range(3)], [8, 16, 32]),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)),
        lambda rows: (torch.randn(rows, 6),), ["0", "1", "2", "3", "4"], [16, 16, 12, 12, 4],
    ),
    "convolutions": (_convolutions, lambda rows: (torch.randn(rows, 1, 8, 8),), ["0", "1", "2", "3", "4"], [8, 12, 12, None, 4]),
    "pairs": (Pairs, lambda rows: (torch.randn(rows, 6),), ["blocks.0", "blocks.1", "blocks.2"], [6] * 3),
    "stacked": (Stacked, lambda rows: (torch.randn(rows, 5, 6),), ["blocks.0", "blocks.1", "blocks.2"], [16] * 3),
}  # fmt: skip
"""Name -> (network, batch of some rows, its blocks, their widths); all have four classes."""


def run(net: nn.Module, batch: Batch) -> Any:
    """Call it."""
    return net(**batch) if isinstance(batch, dict) else net(*batch)
