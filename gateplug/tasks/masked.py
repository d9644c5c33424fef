"""Metrics over the samples that have a label. Their updates read no value back from a GPU, as indexing by a mask would."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities.data import dim_zero_cat

Kind = Literal["classification", "binary", "regression"]
Stage = Literal["train", "val", "test"]


class Masked(Metric):
    """A metric that is told which samples count; NaN where none does."""

    full_state_update = False

    @abstractmethod
    def update(self, predictions: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            predictions: ``(…)`` or ``(…, outputs)``.
            labels: ``(…)`` or ``(…, outputs)``, any finite number where there is none.
            valid: ``(…)`` bool.
        """


class MaskedMean(Masked):
    """Mean of a number for each sample."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    @abstractmethod
    def values(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """The number ``(…)`` of every sample, or ``(…, outputs)`` of which the mean is taken."""

    def update(self, predictions: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Add a batch."""
        values = self.values(predictions, labels)
        values = values if values.dim() == valid.dim() else values.mean(-1)
        self.total += torch.where(valid, values, 0).sum()
        self.count += valid.sum()

    def compute(self) -> Tensor:
        """The mean over all samples of the epoch."""
        return self.total / self.count


class MaskedAccuracy(MaskedMean):
    """Share of right guesses: the largest of ``(…, classes)`` probabilities, or a probability ``(…)`` above 1/2."""

    def values(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """1 where the guess is right."""
        guess = predictions.argmax(-1) if predictions.dim() > labels.dim() else predictions > 0.5
        return (guess == labels).float()


class MaskedSquaredError(MaskedMean):
    """Mean squared error; the mean over its outputs for a sample with several."""

    def values(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """The squared errors."""
        return (predictions - labels).square()


class MaskedAUROC(Masked):
    """Area under the receiver operating characteristic, exact: it keeps every score of the epoch until the end.

    NaN where the epoch has not both kinds of labels.
    """

    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Add a batch."""
        self.scores.append(predictions.flatten().float())
        self.labels.append(torch.where(valid, labels, torch.nan).flatten().float())

    def compute(self) -> Tensor:
        """The area over all samples of the epoch."""
        # a state is one tensor after several processes have been put together, and a list without an update is empty
        scores, labels = (dim_zero_cat(x) if len(x) else torch.zeros(0, device=self.device) for x in (self.scores, self.labels))
        valid = ~labels.isnan()
        scores, labels = scores[valid], labels[valid].long()
        if not len(labels) or labels.min() == labels.max():
            return torch.tensor(torch.nan, device=self.device)
        return binary_auroc(scores, labels, validate_args=False)


def default_metrics(kind: Kind, stage: Stage) -> dict[str, Metric]:
    """The metrics of a kind of task by name; ``auroc`` is not computed in training, where it would keep a whole epoch."""
    if kind == "regression":
        return {"mse": MaskedSquaredError()}
    accuracy: dict[str, Metric] = {"accuracy": MaskedAccuracy()}
    return accuracy | {"auroc": MaskedAUROC()} if kind == "binary" and stage != "train" else accuracy


class TaskLosses(Metric):
    """Sums of the losses of several tasks over an epoch, and the numbers of samples that they were summed over."""

    sums: Tensor
    counts: Tensor
    full_state_update = False

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(tasks), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(tasks, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Add a batch: ``(tasks,)`` twice."""
        self.sums += sums
        self.counts += counts

    def compute(self) -> tuple[Tensor, Tensor]:
        """Both, over all batches and processes."""
        return self.sums, self.counts


def copies(metrics: Mapping[str, Metric]) -> nn.ModuleDict:
    """Copies of metrics of a user by name.

    Raises:
        TypeError: If one is no metric.
        ValueError: If a name cannot be used.
    """
    for name, metric in metrics.items():
        if not isinstance(metric, Metric):
            raise TypeError(f"TaskHead(metrics={{{name!r}: …}}): it is a {type(metric).__name__} and no torchmetrics.Metric.")
        check_name("a metric", name)
        if name == "loss":
            raise ValueError("TaskHead(metrics={'loss': …}): this name is that of the task's loss; choose another.")
    return nn.ModuleDict({name: metric.clone() for name, metric in metrics.items()})


def check_name(whose: str, name: object) -> None:
    """Refuse a name that cannot be part of a logged name and the name of a sub-module.

    Raises:
        ValueError: If it is empty, has a dot or a slash, or is an attribute of ``nn.ModuleDict``.
    """
    if not isinstance(name, str) or not name or "." in name or "/" in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r} cannot be the name of {whose}: it must be a text without '.' and '/', and none that torch uses for itself"
            " (keys, values, items, type, train …)."
        )
