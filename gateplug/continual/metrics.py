"""Accuracy on every task after every task, as a metric."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from gateplug.continual import matrix


class AccuracyMatrix(Metric):
    """R[i, j]: accuracy on task j after stretch i of a stream was trained, and the figures that are made of it.

    Sources of the figures: Lopez-Paz and Ranzato 2017, arXiv 1706.08840; Chaudhry et al. 2018, arXiv 1801.10112.

    Args:
        tasks: number of tasks T, ≥ 1.
        stretches: rows; None: T, each task is trained once, in its order.
        joint: (T,) accuracies of joint training, for intransigence; None: it is not computed.

    Raises:
        ValueError: `tasks` or `stretches` < 1, or `joint` of another length.
    """

    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self, tasks: int, stretches: int | None = None, joint: list[float] | None = None) -> None:
        super().__init__()
        rows = tasks if stretches is None else stretches
        if tasks < 1 or rows < 1:
            raise ValueError(f"AccuracyMatrix(tasks={tasks}, stretches={stretches}): there must be at least one of each")
        if joint is not None and len(joint) != tasks:
            raise ValueError(f"joint has {len(joint)} accuracies, and there are {tasks} tasks: give one for each")
        self.tasks, self.rows, self.joint = tasks, rows, joint
        # the first row is of the untrained network
        self.add_state("right", torch.zeros(rows + 1, tasks, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("total", torch.zeros(rows + 1, tasks, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    def update(self, predictions: Tensor, labels: Tensor, task: int, trained: int) -> None:
        """Count a batch.

        Args:
            predictions: (B,) classes, or (B, C) logits.
            labels: (B,); −100 is left out.
            task: of the batch.
            trained: the stretch that was trained last, −1 for the untrained network.
        """
        if predictions.dim() == 2:
            predictions = predictions.argmax(-1)
        counted = labels != -100
        self.right[trained + 1, task] += ((predictions == labels) & counted).sum()
        self.total[trained + 1, task] += counted.sum()

    def restart(self, trained: int) -> None:
        """Forget a row, before it is measured (anew)."""
        self.right[trained + 1] = 0
        self.total[trained + 1] = 0
        self._computed = None

    seen: Tensor | None = None
    """`values` over all processes, of the last :meth:`compute`."""

    @property
    def values(self) -> Tensor:
        """(stretches + 1, T): accuracies, nan where nothing was measured; the first row is of the untrained network."""
        return torch.where(self.total > 0, self.right / self.total.clamp_min(1), torch.nan)

    def compute(self) -> dict[str, Tensor]:
        """The figures after the last stretch that was measured; those that cannot be computed are left out.

        `average_accuracy` is over the tasks that were measured. The others need tasks that are trained once, in their order, and
        every entry that their formula takes.
        """
        self.seen = self.values.cpu()
        R = self.seen[1:]
        measured = (~R.isnan()).any(1).nonzero().flatten().tolist()
        if not measured:
            return {}
        last = measured[-1] + 1
        row = R[last - 1]
        if self.rows != self.tasks:
            return {"average_accuracy": row[~row.isnan()].mean()}
        R, b = R[:last, :last], self.seen[0, :last]
        found = {
            "average_accuracy": matrix.average_accuracy(R),
            "learning_accuracy": matrix.learning_accuracy(R),
            "backward_transfer": matrix.backward_transfer(R),
            "forgetting": matrix.forgetting(R),
        }
        if last > 1 and not bool(torch.cat([R.diagonal(1), b[1:]]).isnan().any()):
            found["forward_transfer"] = matrix.forward_transfer(R, b)
        if self.joint is not None:
            found["intransigence"] = matrix.intransigence(R, torch.tensor(self.joint[:last], dtype=R.dtype))
        return {name: value for name, value in found.items() if not bool(value.isnan())}
