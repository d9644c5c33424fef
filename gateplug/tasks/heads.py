"""One task, or many alike, of a network with several: tower, loss, weight and metrics."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from gateplug.core.errors import real_numbers, whole_numbers
from gateplug.tasks.batch import check_integer_labels
from gateplug.tasks.masked import Kind, Masked, Stage, TaskLosses, copies, default_metrics


class Target(NamedTuple):
    """Labels as a loss takes them.

    Attributes:
        labels: As the predictions without their classes: integers for classification, else floats; 0 where there is none.
        valid: ``(batch,)`` or ``(batch, count)`` bool: whether there is a label.
    """

    labels: Tensor
    valid: Tensor


class TaskHead(nn.Module):
    """One task of a :class:`MultiTask`, or ``count`` alike: what is between the network and the loss, and the loss.

    ============== ============================ =========================== =================================
    kind           labels                       no label                    loss; metrics
    ============== ============================ =========================== =================================
    classification class numbers                ``ignore_index`` or NaN     cross-entropy; accuracy
    binary         0 or 1, of any number type   ``ignore_index`` or NaN     binary cross-entropy with logits;
                                                                            accuracy, in evaluation ``auroc``
    regression     numbers                      NaN                         squared error; ``mse``
    ============== ============================ =========================== =================================

    With ``count`` above 1, labels are ``(batch, count)``, the network's part ``(batch, count, features)``, and the head's loss
    is the mean over its tasks of each task's mean over its samples with a label; a task that has none in a batch counts as 0.
    Metrics are taken over the samples of all its tasks.

    Args:
        kind: What the task predicts.
        outputs: Numbers that are predicted for a sample: the classes of a classification (at least 2), 1 of a binary task, any
            number of a regression, whose labels then are ``(batch, outputs)`` and whose loss is their mean; a NaN among them
            leaves the sample out.
        weight: Factor of the head's loss in the sum over all, ≥ 0.
        tower: Module from the network's part to ``(batch, outputs)`` (or ``(batch, count, outputs)``); None: the network's part
            is that already. A single output may also come without its dimension.
        count: Number of tasks alike, ≥ 1; give such a head :class:`TaskTowers`.
        ignore_index: Label that stands for none, besides NaN; not used in regression, where every number is a label.
        loss: ``(predictions, labels) -> loss of each sample`` instead of the kind's own, in a form that a mean over the batch is
            not yet taken of (``torch.nn.HuberLoss(reduction="none")``). Samples without a label are zeros to it, and left out
            of what it returns. A module can be named in a YAML file.
        metrics: Name to metric of ``torchmetrics``, instead of the kind's own; each stage has a copy. They are given the
            samples with a label, ``(n, classes)`` or ``(n,)`` probabilities or ``(n,)`` or ``(n, outputs)`` numbers; picking
            them makes a GPU wait at every step, which the kind's own metrics do not.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If the loss or a metric is none.
    """

    def __init__(
        self,
        kind: Kind,
        outputs: int = 1,
        weight: float = 1.0,
        tower: nn.Module | None = None,
        count: int = 1,
        ignore_index: int = -100,
        loss: nn.Module | Callable[..., Any] | None = None,
        metrics: dict[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        whole_numbers(outputs=outputs, count=count, ignore_index=ignore_index)
        real_numbers(weight=weight)
        if kind not in get_args(Kind):
            raise ValueError(f"TaskHead(kind={kind!r}): allowed are {', '.join(get_args(Kind))}.")
        if kind == "classification" and outputs < 2:
            raise ValueError(f"TaskHead(outputs={outputs}): a classification needs its number of classes, at least 2.")
        if kind == "binary" and outputs != 1:
            raise ValueError(f"TaskHead(outputs={outputs}): a binary task has 1; several questions at once are count={outputs}.")
        if outputs < 1 or count < 1:
            raise ValueError(f"TaskHead(outputs={outputs}, count={count}): both must be at least 1.")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"TaskHead(weight={weight}): a finite number, 0 or more.")
        if kind == "binary" and ignore_index in (0, 1):
            raise ValueError(f"TaskHead(ignore_index={ignore_index}): 0 and 1 are the labels of a binary task.")
        if loss is not None and not callable(loss):
            raise TypeError(f"TaskHead(loss={loss!r}): a module or function (predictions, labels) -> loss of each sample.")
        if tower is not None and not isinstance(tower, nn.Module):
            raise TypeError(f"TaskHead(tower={tower!r}): a module, or None.")
        if metrics is not None and not isinstance(metrics, Mapping):
            raise TypeError(f"TaskHead(metrics={metrics!r}): a dict, name -> metric of torchmetrics.")
        self.kind, self.outputs, self.weight, self.count, self.ignore_index = kind, outputs, float(weight), count, ignore_index
        self.name = "task"
        self.tower, self.loss = tower, loss
        stages: tuple[Stage, ...] = get_args(Stage)
        own = [default_metrics(kind, stage) if metrics is None else metrics for stage in stages]
        self.train_metrics, self.val_metrics, self.test_metrics = (copies(given) for given in own)
        self.val_losses, self.test_losses = TaskLosses(count), TaskLosses(count)

    def forward(self, part: Tensor) -> Tensor:
        """Predictions (logits of a classification or binary task), in float32 or wider.

        Args:
            part: Of the network's output: ``(batch, …)``, or ``(batch, count, …)`` if there are several tasks.

        Returns:
            ``(batch[, count], outputs)``, without the last dimension for one output.

        Raises:
            ValueError: If tower and network do not give this shape.
        """
        y: Tensor = part if self.tower is None else self.tower(part)
        batch = part.shape[0]  # not len(), which torch.export takes for a constant
        lead = (batch, self.count) if self.count > 1 else (batch,)
        if self.outputs == 1 and y.shape == (*lead, 1):
            y = y.squeeze(-1)
        wanted = lead if self.outputs == 1 else (*lead, self.outputs)
        if y.shape != wanted:
            who = "network" if self.tower is None else "tower"
            shown = ", ".join(("batch", *map(str, lead[1:]), str(self.outputs)))
            raise ValueError(
                f"Task {self.name!r}: the {who} gives a tensor of shape {tuple(y.shape)} for a batch of {batch}; it must be"
                f" ({shown}). Correct `outputs`, or give the task a `tower` that ends in {self.outputs} outputs."
            )
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def target(self, labels: Any, predictions: Tensor, look: bool) -> Target:
        """Labels as the loss takes them, and where there are none.

        Args:
            labels: Of a batch, or None where it has none of this task.
            predictions: What they are to be compared to.
            look: Whether their values may be checked, for which a GPU has to stop.

        Raises:
            TypeError: If they are no tensor of numbers.
            ValueError: If their shape does not fit, or a value is out of its range.
        """
        shape = predictions.shape[:-1] if self.kind == "classification" else predictions.shape
        several = self.kind == "regression" and self.outputs > 1
        if labels is None:
            valid = torch.zeros(shape[:-1] if several else shape, dtype=torch.bool, device=predictions.device)
            return Target(predictions.new_zeros(shape, dtype=torch.long if self.kind == "classification" else None), valid)
        if not isinstance(labels, Tensor) or labels.is_complex():
            what = f"have dtype {labels.dtype}" if isinstance(labels, Tensor) else f"are a {type(labels).__name__}"
            raise TypeError(f"Task {self.name!r}: its labels {what}; they must be a tensor of numbers.")
        if labels.shape != shape:
            raise ValueError(
                f"Task {self.name!r}: labels have shape {tuple(labels.shape)} and must have {tuple(shape)}; the predictions have"
                f" {tuple(predictions.shape)}."
            )
        if not labels.is_floating_point():
            labels = labels.long()  # of bytes, −100 would be 156
        known = ~labels.isnan() if self.kind == "regression" else ~labels.isnan() & (labels != self.ignore_index)
        labels = torch.where(known, labels, 0)
        if look:
            self._check_values(labels)
        labels = labels.long() if self.kind == "classification" else labels.to(predictions.dtype)
        return Target(labels, known.all(-1) if several else known)

    def losses(self, predictions: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Sum of the losses over samples with a label, and their number, for each of the head's tasks.

        Args:
            predictions: As :meth:`forward` gives them.
            target: As :meth:`target` gives it.

        Returns:
            ``(count,)`` floats and ``(count,)`` integers.

        Raises:
            ValueError: If a loss of the user's does not give a number for each sample.
        """
        valid = target.valid
        more = valid.reshape(*valid.shape, *[1] * (predictions.dim() - valid.dim()))
        # Twice: a number of a sample without a label that is not finite must reach neither the loss nor a gradient.
        each = self._each(torch.where(more, predictions, 0), target.labels)
        each = torch.where(valid, each, 0).reshape(-1, self.count)
        return each.sum(0), valid.reshape(-1, self.count).sum(0)

    def probabilities(self, predictions: Tensor) -> Tensor:
        """Predictions as they are to be read: probabilities, or the numbers of a regression; shape as before."""
        if self.kind == "classification":
            return predictions.softmax(-1)
        return predictions.sigmoid() if self.kind == "binary" else predictions

    def metrics(self, stage: Stage) -> dict[str, Metric]:
        """The metrics of a stage by name."""
        found: nn.ModuleDict = getattr(self, f"{stage}_metrics")
        return dict(found.items())  # type: ignore[arg-type]

    def update(self, stage: Stage, predictions: Tensor, target: Target) -> None:
        """Add a batch to the metrics of a stage."""
        given, labels = self.probabilities(predictions.detach()), target.labels
        for metric in self.metrics(stage).values():
            if isinstance(metric, Masked):
                metric.update(given, labels, target.valid)
            else:
                chosen = labels[target.valid]
                if len(chosen):
                    metric.update(given[target.valid], chosen.long() if self.kind == "binary" else chosen)

    def _each(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """The loss of every sample ``(batch[, count])``."""
        if self.loss is None and self.kind == "classification":
            each = F.cross_entropy(predictions.flatten(0, -2), labels.flatten(), reduction="none").reshape(labels.shape)
        elif self.loss is None and self.kind == "binary":
            each = F.binary_cross_entropy_with_logits(predictions, labels, reduction="none")
        elif self.loss is None:
            each = (predictions - labels).square()
        else:
            each = self.loss(predictions, labels)
            if not isinstance(each, Tensor) or each.shape != labels.shape:
                what = f"a tensor of shape {tuple(each.shape)}" if isinstance(each, Tensor) else f"a {type(each).__name__}"
                raise ValueError(
                    f"Task {self.name!r}: its loss returned {what} for labels of shape {tuple(labels.shape)}; it must return a"
                    " tensor of their shape (torch's losses: reduction='none')."
                )
        return each.mean(-1) if self.kind == "regression" and self.outputs > 1 else each

    def _check_values(self, labels: Tensor) -> None:
        if self.kind == "classification":
            if bool((broken := labels != labels.round()).any()):
                raise ValueError(f"Task {self.name!r}: a label is {labels[broken][0].item()}; classes are whole numbers.")
            try:
                check_integer_labels(labels.long(), self.outputs)
            except ValueError as error:
                raise ValueError(f"Task {self.name!r}: {error}") from None
        wrong = labels.isinf() if self.kind == "regression" else (labels != 0) & (labels != 1)
        if self.kind != "classification" and bool(wrong.any()):
            allowed = "finite" if self.kind == "regression" else f"0 or 1, or {self.ignore_index} or NaN for none"
            raise ValueError(f"Task {self.name!r}: a label is {labels[wrong][0].item()}; labels must be {allowed}.")
