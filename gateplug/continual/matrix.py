"""Figures of a stream, from the matrix of accuracies R (T, T): R[i, j] is the accuracy on task j after training task i.

Entries that were not measured are nan. Sources: Lopez-Paz and Ranzato 2017, arXiv 1706.08840; Chaudhry et al. 2018, arXiv
1801.10112.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _tasks(R: Tensor) -> int:
    if R.dim() != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise ValueError(f"R of shape {tuple(R.shape)} must be square: accuracy on each task after training each task")
    return len(R)


def _nan(R: Tensor) -> Tensor:
    return R.new_full((), float("nan"))


def average_accuracy(R: Tensor) -> Tensor:
    """Mean over tasks of the accuracy at the end: mean_j R[T−1, j].

    Raises:
        ValueError: R is not square (the same for all of these).
    """
    _tasks(R)
    return R[-1].mean()


def learning_accuracy(R: Tensor) -> Tensor:
    """Mean over tasks of the accuracy right after a task was trained: mean_j R[j, j]."""
    _tasks(R)
    return R.diagonal().mean()


def backward_transfer(R: Tensor) -> Tensor:
    """What later tasks did to earlier ones: 1/(T−1) Σ_{j<T−1} (R[T−1, j] − R[j, j]); nan for one task."""
    if _tasks(R) == 1:
        return _nan(R)
    return (R[-1, :-1] - R.diagonal()[:-1]).mean()


def forgetting(R: Tensor) -> Tensor:
    """1/(T−1) Σ_{j<T−1} (max_{j≤i<T−1} R[i, j] − R[T−1, j]); nan for one task.

    From the best accuracy on a task before the last one was trained, to what is left. The maximum begins at i = j: before that
    the task was not learnt.
    """
    tasks = _tasks(R)
    if tasks == 1:
        return _nan(R)
    return torch.stack([R[j : tasks - 1, j].max() - R[-1, j] for j in range(tasks - 1)]).mean()


def forward_transfer(R: Tensor, b: Tensor) -> Tensor:
    """What earlier tasks did for later ones: 1/(T−1) Σ_{j≥1} (R[j−1, j] − b_j); nan for one task.

    Args:
        R: (T, T).
        b: (T,), accuracy of the untrained network.

    Raises:
        ValueError: one of the entries was not measured.
    """
    if _tasks(R) == 1:
        return _nan(R)
    used = torch.stack([R.diagonal(1), b[1:]])
    if bool(used.isnan().any()):
        raise ValueError(
            "forward transfer needs the accuracy on each task before it was trained, and of the untrained network: evaluate the "
            "tasks to come as well (TaskStream(forward=True))"
        )
    return (used[0] - used[1]).mean()


def intransigence(R: Tensor, joint: Tensor) -> Tensor:
    """How far learning a task falls behind joint training on all: mean_j (J_j − R[j, j]).

    Args:
        R: (T, T).
        joint: (T,), accuracies of a network trained on all tasks together.
    """
    _tasks(R)
    return (joint - R.diagonal()).mean()
