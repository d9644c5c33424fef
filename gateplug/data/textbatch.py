"""Tokenized texts in memory, and the batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gateplug.data.objectives import IGNORE, corrupt, hide
from gateplug.data.randomness import uniform
from gateplug.data.tokens import ByteTokens, HubTokens, Ids


class TextRows(Dataset[Any]):
    """Texts of different lengths in one flat tensor, which worker processes share.

    Args:
        ids: Token ids of each text.
        segments: Segment numbers of each text, or None.
        labels: ``(texts, …)``, or None.
    """

    def __init__(self, ids: Sequence[Ids], segments: Sequence[Ids] | None, labels: Tensor | None) -> None:
        self.flat = torch.from_numpy(np.concatenate(list(ids)).astype(np.int32))
        self.ends = torch.tensor([len(row) for row in ids]).cumsum(0)
        self.segments = None if segments is None else torch.from_numpy(np.concatenate(list(segments)).astype(np.int32))
        self.labels = labels

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        span = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        item = {"input_ids": self.flat[span]}
        if self.segments is not None:
            item["token_type_ids"] = self.segments[span]
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item


class TextBatch:
    """Items of :class:`TextRows` to a padded batch, with the task's tokens hidden by the samples' keys.

    Args:
        task: As in :class:`~gateplug.data.TextData`.
        vocabulary: Its special ids are used.
        most: Most tokens of a row; rounding up to 8 does not go beyond.
        closed: Whether the items are blocks, which get no end token of their own.
        mask_probability: For ``masked_lm``.
        noise_density: For ``span_corruption``.
        mean_span: For ``span_corruption``, tokens.
    """

    def __init__(
        self,
        task: str,
        vocabulary: ByteTokens | HubTokens,
        most: int,
        closed: bool,
        mask_probability: float,
        noise_density: float,
        mean_span: float,
    ) -> None:
        self.task, self.most, self.closed = task, most, closed
        self.pad, self.end, self.mask, self.sentinels = vocabulary.pad, vocabulary.end, vocabulary.mask, vocabulary.sentinels
        self.special = torch.zeros(vocabulary.vocab_size, dtype=torch.bool)
        self.special[[*vocabulary.special, vocabulary.pad]] = True
        self.mask_probability, self.noise_density, self.mean_span = mask_probability, noise_density, mean_span

    def __call__(self, items: list[dict[str, Tensor]], keys: Tensor) -> dict[str, Tensor]:
        """Make a batch of the items and their samples' keys."""
        ids = [item["input_ids"] for item in items]
        labels: Tensor | None = None
        if self.task == "span_corruption":
            ids, labels = self._spans(ids, keys)
        elif self.task == "causal_lm" and not self.closed:
            ids = [torch.cat([row, row.new_tensor([self.end])]) for row in ids]
        inputs = padded(ids, self.pad, self.most)
        mask = (torch.arange(inputs.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]).long()
        if self.task == "causal_lm":
            labels = inputs.masked_fill(mask == 0, IGNORE)
        elif self.task == "masked_lm" and self.mask is not None:
            inputs, labels = hide(inputs, keys, self.mask, self.special, self.mask_probability)
        elif labels is None:
            labels = torch.stack([item["labels"] for item in items])
        batch = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
        if "token_type_ids" in items[0]:
            batch["token_type_ids"] = padded([item["token_type_ids"] for item in items], 0, self.most)
        return batch

    def _spans(self, ids: list[Tensor], keys: Tensor) -> tuple[list[Tensor], Tensor]:
        assert self.end is not None
        longest = max(len(row) for row in ids)
        draws = torch.stack([uniform(keys, longest, stream) for stream in (1, 2)], dim=1).numpy()
        pairs = [
            corrupt(row.numpy(), draw, self.sentinels, self.end, self.noise_density, self.mean_span)
            for row, draw in zip(ids, draws, strict=True)
        ]
        inputs, labels = ([torch.from_numpy(part) for part in column] for column in zip(*pairs, strict=True))
        return inputs, padded(labels, IGNORE, self.most)


def padded(rows: Sequence[Tensor], value: int, most: int, multiple: int = 8) -> Tensor:
    """Rows of different lengths as one tensor: int64 ``(rows, width)``.

    Args:
        rows: Integers ``(tokens,)`` each.
        value: What to fill up with.
        most: The width does not go beyond it because of ``multiple``.
        multiple: The width is a multiple of it where ``most`` allows.
    """
    longest = max(len(row) for row in rows)
    width = max(longest, min(-(-longest // multiple) * multiple, most))
    out = torch.full((len(rows), width), value, dtype=torch.int64)
    for row, source in zip(out, rows, strict=True):
        row[: len(source)] = source
    return out


def blocks(ids: Sequence[Ids], size: int, end: int | None) -> list[Ids]:
    """Join texts, each closed by the end token, and cut them into blocks of ``size``; the rest is dropped."""
    closing = np.array([] if end is None else [end], dtype=np.int32)
    flat = np.concatenate([part for row in ids for part in (row, closing)]).astype(np.int32)
    return list(flat[: len(flat) // size * size].reshape(-1, size))
