"""Labels and inputs of a batch, whatever its form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a network, by place and by name."""


def labels_of(batch: Any) -> Tensor:
    """Class numbers (B,) of a batch: under `labels` (or `label`) of a mapping, or the last part of (inputs, labels).

    Raises:
        ValueError: there are none; one label a sample, a whole number, is needed.
    """
    found = batch
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in ("labels", "label") if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[-1]
    if not isinstance(found, Tensor) or found.is_floating_point() or found.dim() != 1:
        what = "missing" if found is None else type(found).__name__
        if isinstance(found, Tensor):
            what = f"of shape {tuple(found.shape)} and {found.dtype}"
        raise ValueError(
            f"the class of each sample is needed, and the batch's labels are {what}. They must be whole numbers (B,), "
            "under the batch's key 'labels' or the last part of (inputs, labels)"
        )
    return found


def first_sample(value: Any, size: int) -> Any:
    """The first of `size` samples in a call's arguments, without a graph."""
    return rows_of(value, torch.arange(1), size)


def rows_of(value: Any, rows: Tensor, samples: int) -> Any:
    """These rows (numbers, or a mask) of a call's arguments: of tensors with as many rows as there are samples."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.dim() and len(value) == samples else value
    if isinstance(value, Mapping):
        return {key: rows_of(item, rows, samples) for key, item in value.items()}
    if isinstance(value, tuple | list):
        parts = [rows_of(item, rows, samples) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def holds_rows(value: Any, rows: int) -> bool:
    """Whether there is a tensor in it with so many rows."""
    if isinstance(value, Mapping):
        return any(holds_rows(item, rows) for item in value.values())
    if isinstance(value, tuple | list):
        return any(holds_rows(item, rows) for item in value)
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def logits_of(out: Any) -> Tensor:
    """Logits (B, C) in a network's output.

    Raises:
        ValueError: there are none.
    """
    found = out
    if isinstance(out, Mapping):
        found = out.get("logits")
    elif isinstance(out, tuple | list) and out:
        found = out[0]
    if not isinstance(found, Tensor) or found.dim() != 2:
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"logits (batch, classes) are needed as what the network returns, or as its `logits`; it returned {what}"
        )
    return found.to(torch.promote_types(found.dtype, torch.float32))
