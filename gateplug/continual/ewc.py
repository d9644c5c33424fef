"""Elastic weight consolidation: what the loss of earlier tasks was most sensitive to moves least."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateplug.continual.functional import fisher as mean_square
from gateplug.continual.measured import Measured
from gateplug.continual.penalty import Tensors, trained
from gateplug.core.batches import labels_of
from gateplug.core.errors import nearest, real_numbers, whole_numbers
from gateplug.core.resume import step_seed

FISHERS = ("empirical", "sampled")
_LABEL = 0xF15  # keeps the labels that are drawn apart from other uses of the seed


class EWC(Measured):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796), and its online form (Schwarz et al. 2018).

    At the end of each task t of a stream the diagonal of the Fisher information is measured, F_t = mean over samples of
    (∂ ln p(y|x) / ∂θ)², with the gradient of each sample by itself, in eval mode. From then on the loss has a further term

        λ/2 Σ_t Σ F_t (θ − θ_t)²                        online: F ← γ F + F_t and λ/2 Σ F (θ − θ*)², θ* of the last task

    which does not depend on the size of a batch. All trainable parameters count. The sum over tasks is kept as one parabola, so
    memory is two numbers a parameter and a step costs the same, however many tasks there were.

    By hand, without a Trainer: `loss = ewc.total_loss(net, loss)` in each step, `ewc.consolidate(net, batches)` after each task.

    Args:
        weight: λ ≥ 0. It is of the size of 1 / F: 100 to 10,000 are common.
        samples: N ≥ 1, of a task; the first ones of the stream's `task_batches`.
        online: one anchor, that of the last task.
        decay: γ in [0, 1], with `online` alone.
        fisher: `empirical`: y is the true label; `sampled`: y is drawn from what the network answers, as the Fisher information
            is defined. The empirical one fades where the training set is fitted well.
        seed: of the labels that are drawn.

    Raises:
        ValueError: a number out of its range, an unknown name, a decay without `online`.
    """

    summary: ClassVar[str] = "holds what earlier tasks' losses were sensitive to (elastic weight consolidation)"
    paper: ClassVar[str] = "arXiv 1612.00796"
    term: ClassVar[str] = "ewc"

    def __init__(
        self,
        weight: float = 1000.0,
        samples: int = 200,
        online: bool = False,
        decay: float = 1.0,
        fisher: str = "empirical",
        seed: int = 0,
    ) -> None:
        self._start_measured(weight, samples)
        real_numbers(decay=decay)
        whole_numbers(seed=seed)
        if not isinstance(online, bool):
            raise TypeError(f"online={online!r} must be True or False")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} must lie in [0, 1]: what stays of the importance of earlier tasks")
        if decay != 1 and not online:
            raise ValueError(f"decay={decay} is of online EWC: give online=True as well, or leave it out")
        if fisher not in FISHERS:
            raise ValueError(f"fisher={fisher!r} must be one of {', '.join(FISHERS)}.{nearest(str(fisher), FISHERS)}")
        self.online, self.decay, self.fisher, self.seed = online, decay, fisher, seed

    def value(self, logits: Tensor, label: Tensor) -> Tensor:
        """−ln p(label)."""
        return F.cross_entropy(logits[None], label[None])

    def mean(self, gradients: Tensor) -> Tensor:
        """Of squares."""
        return mean_square(gradients)

    def labels(self, logits: Tensor, batch: Any, places: Tensor, task: int) -> Tensor:
        """The batch's own, or drawn: sample number i of a task gets the same draw, however batches are cut."""
        if self.fisher == "empirical":
            return labels_of(batch)
        generator = torch.Generator().manual_seed(step_seed(self.seed, _LABEL, task))
        draws = torch.rand(self.samples, generator=generator, dtype=torch.float64)
        draws = draws[places.cpu().clamp_max(self.samples - 1)].to(logits.device, torch.float32)
        passed = logits.float().softmax(-1).cumsum(-1) <= draws[:, None]
        return passed.sum(-1).clamp_max(logits.shape[-1] - 1)

    def hold(self, importance: Tensors, module: nn.Module) -> None:
        """Add the task's parabola, or let the online one fade and follow."""
        parameters = trained(module)
        if not self.online:
            self.penalty.add(importance, parameters)
            return
        self.penalty.begin(parameters)
        old = self.penalty.importance
        self.penalty.replace({name: self.decay * old[name] + f for name, f in importance.items()}, parameters)
