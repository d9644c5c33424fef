"""The order of pixels that makes a task of a permuted stream."""

from __future__ import annotations

import torch


def permutation(seed: int, task: int, n: int) -> torch.Tensor:
    """Order of the n pixels in a task of a permuted stream: (n,) int64, the identity for task 0."""
    if task == 0:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + task))
