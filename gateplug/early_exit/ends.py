"""What comes after the last block, by the layers of the network itself: one row of the table of families is one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

End = Callable[[Any, Tensor, Tensor | None], Tensor]
"""From a model, the output of its last block, and the places of the last tokens (B,), to logits (B, C)."""


def first_token(norm: nn.Module | None, hidden: Tensor) -> Tensor:
    """(B, d) of token 0, through a norm that works token by token: on that token alone."""
    return hidden[:, 0] if norm is None else norm(hidden[:, :1])[:, 0]


def token_at(norm: nn.Module | None, hidden: Tensor, places: Tensor) -> Tensor:
    """(B, d) of one token a row, the same way."""
    rows = hidden[torch.arange(hidden.shape[0], device=hidden.device), places]
    return rows if norm is None else norm(rows[:, None])[:, 0]


def vit(model: Any, hidden: Tensor, places: Tensor | None) -> Tensor:
    """ViT."""
    return model.classifier(first_token(model.vit.layernorm, hidden))  # type: ignore[no-any-return]


def deit(model: Any, hidden: Tensor, places: Tensor | None) -> Tensor:
    """DeiT."""
    return model.classifier(first_token(model.deit.layernorm, hidden))  # type: ignore[no-any-return]


def deit_with_teacher(model: Any, hidden: Tensor, places: Tensor | None) -> Tensor:
    """DeiT with a distillation token: the mean of two classifiers."""
    tokens = model.deit.layernorm(hidden[:, :2])
    return (model.cls_classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2  # type: ignore[no-any-return]


def bert(model: Any, hidden: Tensor, places: Tensor | None) -> Tensor:
    """BERT: its pooler takes token 0."""
    return model.classifier(model.dropout(model.bert.pooler(hidden)))  # type: ignore[no-any-return]


def roberta(model: Any, hidden: Tensor, places: Tensor | None) -> Tensor:
    """RoBERTa: its classifier takes token 0."""
    return model.classifier(hidden)  # type: ignore[no-any-return]


def distilbert(model: Any, hidden: Tensor, places: Tensor | None) -> Tensor:
    """DistilBERT."""
    return model.classifier(model.dropout(model.pre_classifier(hidden[:, 0]).relu()))  # type: ignore[no-any-return]


def gpt2(model: Any, hidden: Tensor, places: Tensor | None) -> Tensor:
    """GPT-2."""
    assert places is not None
    return model.score(token_at(model.transformer.ln_f, hidden, places))  # type: ignore[no-any-return]


def resnet(model: Any, hidden: Tensor, places: Tensor | None) -> Tensor:
    """ResNet: its classifier flattens."""
    return model.classifier(model.resnet.pooler(hidden))  # type: ignore[no-any-return]
