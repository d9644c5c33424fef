"""Memory aware synapses: what the answers of the network are most sensitive to moves least."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gateplug.continual.functional import mas_importance
from gateplug.continual.head_gate import counted
from gateplug.continual.measured import Measured
from gateplug.continual.penalty import Tensors, trained
from gateplug.core.errors import nearest

ACCUMULATE = ("mean", "sum")


class MAS(Measured):
    """Memory aware synapses (Aljundi et al. 2018, arXiv 1711.09601).

    At the end of each task Ω_t is measured, the mean over samples of the absolute value of ∂ ‖f(x)‖² / ∂θ, f(x) the logits of
    one sample, in eval mode; no label is needed. It is averaged over the tasks, Ω ← (t Ω + Ω_t) / (t + 1), and the loss has a
    further term λ/2 Σ Ω (θ − θ*)², θ* the parameters after the last task. All trainable parameters count; memory is two numbers
    a parameter.

    By hand, without a Trainer: `loss = mas.total_loss(net, loss)` in each step, `mas.consolidate(net, batches)` after each task.

    Args:
        weight: λ ≥ 0.
        samples: N ≥ 1, of a task; the first ones of the stream's `task_batches`.
        accumulate: `mean` over tasks, or their `sum`.

    Raises:
        ValueError: a number out of its range, an unknown name.
    """

    summary: ClassVar[str] = "holds what the answers on earlier tasks were sensitive to (memory aware synapses)"
    paper: ClassVar[str] = "arXiv 1711.09601"
    term: ClassVar[str] = "mas"

    def __init__(self, weight: float = 1.0, samples: int = 200, accumulate: str = "mean") -> None:
        self._start_measured(weight, samples)
        if accumulate not in ACCUMULATE:
            raise ValueError(
                f"accumulate={accumulate!r} must be one of {', '.join(ACCUMULATE)}.{nearest(str(accumulate), ACCUMULATE)}"
            )
        self.accumulate = accumulate

    def value(self, logits: Tensor, label: Tensor) -> Tensor:
        """‖f(x)‖²; a class that is masked (−inf) is no part of it."""
        return torch.where(counted(logits), logits, 0.0).square().sum()

    def mean(self, gradients: Tensor) -> Tensor:
        """Of absolute values."""
        return mas_importance(gradients)

    def labels(self, logits: Tensor, batch: Any, places: Tensor, task: int) -> Tensor:
        """None are needed: zeros."""
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device)

    def hold(self, importance: Tensors, module: nn.Module) -> None:
        """Average, or add up, and anchor at the parameters."""
        parameters, tasks = trained(module), self.penalty.tasks
        self.penalty.begin(parameters)
        old = self.penalty.importance
        share, part = (tasks / (tasks + 1), 1 / (tasks + 1)) if self.accumulate == "mean" else (1.0, 1.0)
        self.penalty.replace({name: share * old[name] + part * omega for name, omega in importance.items()}, parameters)
