"""The class of each sample of somebody's data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from gateplug.data.loader import KeyedDataset
from gateplug.data.module import TensorRows
from gateplug.data.stream_kinds import LABELS


def dataset_labels(dataset: Any, owner: str) -> Tensor:
    """Labels of all samples: int64 ``(n,)``.

    They are taken from where gateplug, torch and torchvision keep them; from an attribute ``targets`` or ``labels`` where it says
    of the first sample what the sample itself says; else every sample is read, once.

    Args:
        dataset: Map-style.
        owner: Whose it is, for the error.

    Raises:
        ValueError: If a sample has no label that is a whole number ≥ 0.
    """
    found = _kept(dataset)
    if found is None:
        found = [_label(dataset[i]) for i in range(len(dataset))]
    labels = torch.as_tensor(found) if not any(label is None for label in found) else torch.zeros(0, 0)
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool or (len(labels) and labels.min() < 0):
        raise ValueError(
            f"kind='class_split' needs one class a sample, a whole number from 0, and {owner}'s {type(dataset).__name__} has "
            "none: it looks for an attribute 'targets' or 'labels', for items {'labels': …} and for items (inputs, label)."
        )
    return labels.long()


def _kept(dataset: Any) -> Any:
    """Labels that a data set keeps as a column; None where it keeps none that can be trusted."""
    if isinstance(dataset, KeyedDataset):
        return _kept(dataset.dataset)
    if isinstance(dataset, Subset):
        inner = _kept(dataset.dataset)
        return None if inner is None else torch.as_tensor(inner)[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1]
    if isinstance(dataset, TensorRows):
        return next((dataset.columns[key] for key in LABELS if key in dataset.columns), None)
    for name in ("targets", "labels"):
        column: Any = getattr(dataset, name, None)
        sized = isinstance(column, Tensor | list | tuple) or type(column).__module__ == "numpy"
        # names of the classes are called labels too; and a target_transform changes what the column says
        if sized and len(column) == len(dataset) and len(column) and _label(dataset[0]) == _whole(column[0]):
            return column
    return None


def _label(item: Any) -> int | None:
    if isinstance(item, Mapping):
        return next((_whole(item[key]) for key in LABELS if key in item), None)
    return _whole(item[-1]) if isinstance(item, tuple | list) and len(item) > 1 else None


def _whole(value: Any) -> int | None:
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_floating_point()):
        return None
    try:
        return int(value) if int(value) == value else None
    except (TypeError, ValueError):
        return None
