"""Samples of batches of any form, kept as one tensor for each part of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gateplug.core.errors import PlugError

_NO_LABEL = -100


class Column:
    """One part of a batch, for a fixed number of samples.

    Samples that are longer than those before (texts are padded to the longest of their batch) make the column wider; shorter ones
    are padded at the end, with 0, or −100 for labels of tokens.

    Args:
        capacity: samples.
        like: (B, …), samples as they come; the column has their dtype and device.
        labels: whether they are labels.
    """

    def __init__(self, capacity: int, like: Tensor, labels: bool = False) -> None:
        self.fill = _NO_LABEL if labels and like.dim() > 1 and not like.is_floating_point() else 0
        self.values = like.new_full((capacity, *like.shape[1:]), self.fill)
        self.sizes = torch.zeros(capacity, like.dim() - 1, dtype=torch.int64)
        """Each sample's own shape, on the CPU: what is drawn is as wide as it needs to be, and no device is asked."""

    def put(self, slots: list[int], rows: Tensor) -> None:
        """Store rows (N, …) in slots, each of which is there once."""
        self._widen(rows.shape[1:])
        where = torch.tensor(slots)
        self.sizes[where] = torch.tensor(rows.shape[1:], dtype=torch.int64)
        self.values[where.to(self.values.device)] = self._padded(rows.to(self.values), self.values.shape[1:])

    def take(self, slots: Tensor) -> Tensor:
        """Rows (N, …) of slots, as wide as the widest of them."""
        rows = self.values[slots.to(self.values.device)]
        for axis, size in enumerate(self.sizes[slots].amax(0).tolist(), 1):
            rows = rows.narrow(axis, 0, size)
        return rows

    def _widen(self, shape: torch.Size) -> None:
        if len(shape) != self.values.dim() - 1:
            raise PlugError(
                f"Replay keeps samples of {self.values.dim() - 1} axes, and a batch has some of shape {tuple(shape)}: samples "
                "of one stream may differ in length, not in their number of axes"
            )
        wide = torch.Size(map(max, shape, self.values.shape[1:]))
        if wide != self.values.shape[1:]:
            self.values = self._padded(self.values, wide)

    def _padded(self, rows: Tensor, shape: torch.Size) -> Tensor:
        behind = [n for have, want in zip(rows.shape[:0:-1], shape[::-1], strict=True) for n in (0, want - have)]
        return F.pad(rows, behind, value=self.fill) if any(behind) else rows


def leaves(batch: Any, path: str = "") -> dict[str, Tensor]:
    """Tensors of a batch by where they are in it: `input_ids`, `0`, `labels/left`.

    Raises:
        PlugError: it has something else in it, which cannot be mixed with that of other batches.
    """
    if isinstance(batch, Tensor) and batch.dim():
        return {path: batch}
    if batch is None:
        return {}
    if isinstance(batch, Mapping | tuple | list):
        items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        return {k: v for key, value in items for k, v in leaves(value, f"{path}/{key}" if path else str(key)).items()}
    what = f"{type(batch).__name__}{' of one number' if isinstance(batch, Tensor) else ''}"
    raise PlugError(
        f"Replay keeps tensors with a row for each sample, and the batch has a {what} as {path or 'a whole'}: make it a tensor "
        "(batch, …), or leave it out"
    )


def outline(batch: Any) -> Any:
    """The form of a batch, without its tensors."""
    if isinstance(batch, Mapping):
        return {key: outline(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [outline(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return None


def filled(form: Any, tensors: Mapping[str, Tensor], path: str = "") -> Any:
    """A batch of a form from its tensors."""
    if isinstance(form, dict):
        return {key: filled(value, tensors, f"{path}/{key}" if path else str(key)) for key, value in form.items()}
    if isinstance(form, tuple | list):
        parts = [filled(value, tensors, f"{path}/{i}" if path else str(i)) for i, value in enumerate(form)]
        return type(form)(*parts) if hasattr(form, "_fields") else type(form)(parts)
    return tensors.get(path)
