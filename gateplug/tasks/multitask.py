"""Several tasks on one network."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gateplug.core.errors import nearest
from gateplug.tasks.base import Task
from gateplug.tasks.batch import Batch, batch_size, call_net, split_batch
from gateplug.tasks.heads import TaskHead
from gateplug.tasks.masked import Stage, check_name
from gateplug.tasks.parts import split_output
from gateplug.tasks.schedule import OptimizerCallable, SchedulerCallable

_NEVER = 2**62  # a batch index that is never reached


class MultiTask(Task):
    """Train one network for several tasks: for each a tower, a loss, a weight and metrics.

    The loss is Σ weight · loss over the tasks, each the mean over the samples of the batch that have a label of the task
    (NaN or ``ignore_index`` is none), in float32. A batch may have no label of a task, or not even its name: the task adds 0
    then, and what belongs to it alone gets a gradient of zero. A batch without any label is an error.
    Under DDP and accumulation, the means of the processes and batches are averaged.

    Batches are ``{"pixel_values": …, "labels": {"left": …, "right": …}}`` (any inputs) or ``(inputs, {"left": …})``. The
    network returns a tensor ``(batch, tasks, features)`` in the order of ``tasks``, one ``(batch, features)`` that all share,
    a list with a tensor for each task, or a dict with one under each task's name. A head with ``count`` stands for that many
    tasks in the first form, and gets ``(batch, count, features)`` in the last two.

    Logs, at every step of the training, ``train/loss`` and ``train/<task>/loss``, which is NaN where the batch has no label;
    and for each epoch ``train/<task>/<metric>``, ``val/loss``, ``val/<task>/loss``, ``val/<task>/<metric>``, the same of
    ``test``. Losses and metrics of an epoch are over its labels, however they were cut into batches.

    Args:
        net: The network.
        tasks: Name to :class:`TaskHead`, or to the arguments of one.
        optimizer: ``parameters -> optimizer``; AdamW by default.
        scheduler: ``optimizer -> scheduler``. The number of steps is filled in where it is missing.

    Attributes:
        heads: The tasks' heads by name.
        task_losses: Of the last epoch of each evaluation, ``task_losses["test"]["left"]`` is the mean loss of each task in a
            head: float ``(count,)`` on the CPU, NaN without a label.

    Raises:
        ValueError: If there is no task, a name cannot be used, or one head stands under two names.
        TypeError: If a task is no head.

    Example:
        >>> import gateplug as gp
        >>> towers = {name: torch.nn.Linear(4, 10) for name in ("left", "right")}
        >>> heads = {name: gp.TaskHead("classification", outputs=10, tower=tower) for name, tower in towers.items()}
        >>> task = gp.MultiTask(torch.nn.Linear(6, 4), heads)
        >>> task(torch.zeros(2, 6))["left"].shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        net: nn.Module,
        tasks: dict[str, TaskHead],
        optimizer: OptimizerCallable | None = None,
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        if not isinstance(tasks, Mapping) or not tasks:
            raise ValueError(f"MultiTask(tasks={tasks!r}): give a dict with a gp.TaskHead under the name of each task.")
        made: dict[str, TaskHead] = {}
        for name, given in tasks.items():
            check_name("a task", name)
            head = TaskHead(**given) if isinstance(given, Mapping) else given
            if not isinstance(head, TaskHead):
                raise TypeError(f"MultiTask(tasks={{{name!r}: …}}): it is a {type(head).__name__}, and must be a gp.TaskHead.")
            if any(head is other for other in made.values()):
                raise ValueError(f"MultiTask(tasks={{{name!r}: …}}): one head cannot be that of two tasks; copy.deepcopy it.")
            head.name = name
            made[name] = head
        self.heads = nn.ModuleDict(made)
        self.task_losses: dict[str, dict[str, Tensor]] = {}
        self._first_empty: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Predictions of every task, logits for classification and binary tasks, by the task's name.

        Args:
            args: Inputs of the network.
            kwargs: The same by name; names that the network does not know are left out.

        Returns:
            Task to ``(batch[, count], outputs)`` in float32 or wider, without the last dimension for one output.
        """
        heads = self._heads()
        parts = split_output(call_net(self.net, Batch(args, kwargs, None)), {name: head.count for name, head in heads.items()})
        return {name: head(parts[name]) for name, head in heads.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Weighted sum of the tasks' losses in one batch."""
        inputs = split_batch(batch)
        found = self._losses("train", inputs, batch_idx)
        size = batch_size(inputs)
        # a task of weight 0 keeps its place in the graph by a sum of no numbers; 0 · loss is NaN where the loss is infinite
        total = torch.stack(
            [
                head.weight * means(*found[name][:2]).mean() if head.weight else found[name][2].flatten()[:0].sum()
                for name, head in self._heads().items()
            ]
        ).sum()
        self.log("train/loss", total.detach(), batch_size=size)
        for name, (sums, counts, _) in found.items():
            self.log(f"train/{name}/loss", reported(sums.detach(), counts), batch_size=size)
        return total

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the validation's losses and metrics."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the test's losses and metrics."""
        self._evaluate("test", batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Probabilities (numbers for a regression) ``(batch[, count][, outputs])`` by task; labels given are unused."""
        inputs = split_batch(batch)
        predictions = self(*inputs.args, **inputs.kwargs)
        return {name: head.probabilities(predictions[name]) for name, head in self._heads().items()}

    def on_train_epoch_start(self) -> None:
        """Begin to count."""
        self._begin("train")

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        """Begin to count."""
        self._begin("test")

    def on_train_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._end("train")

    def on_validation_epoch_end(self) -> None:
        """Log losses and metrics of the validation."""
        self._end("val")

    def on_test_epoch_end(self) -> None:
        """Log losses and metrics of the test."""
        self._end("test")

    def _heads(self) -> dict[str, TaskHead]:
        return dict(self.heads.items())  # type: ignore[arg-type]

    def _losses(self, stage: Stage, inputs: Batch, batch_idx: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Task to sums ``(count,)`` and numbers ``(count,)`` of its losses, and predictions; the metrics get the batch too."""
        labels = self._labels(inputs.labels)
        predictions = self(*inputs.args, **inputs.kwargs)
        look = self.may_look(stage, next(iter(predictions.values())))
        found = {}
        for name, head in self._heads().items():
            target = head.target(labels.get(name), predictions[name], look)
            found[name] = (*head.losses(predictions[name], target), predictions[name])
            head.update(stage, predictions[name], target)
        self._check_empty(stage, torch.cat([counts for _, counts, _ in found.values()]), batch_idx, look)
        return found

    def _labels(self, labels: Any) -> Mapping[str, Any]:
        names = list(self.heads)
        if not isinstance(labels, Mapping):
            what = "missing" if labels is None else f"a {type(labels).__name__}"
            raise TypeError(
                f"The batch's labels are {what}; they must be a dict of tensors by task ({', '.join(names)}) under the batch's"
                " key 'labels', or the second part of (inputs, labels)."
            )
        unknown = [name for name in labels if name not in names]
        if unknown:
            hint = nearest(str(unknown[0]), names)
            raise ValueError(f"The batch has labels of {unknown}, which are no tasks.{hint} Tasks: {', '.join(names)}.")
        return labels

    def _check_empty(self, stage: Stage, counts: Tensor, batch_idx: int, look: bool) -> None:
        """Raise for a batch without labels; where that would make a GPU wait, remember the first until the epoch ends."""
        if look:
            if not bool(counts.any()):
                raise _no_labels(stage, batch_idx)
            return
        here = torch.where(counts.any(), _NEVER, batch_idx)
        before = self._first_empty.get(stage)
        self._first_empty[stage] = here if before is None else torch.minimum(before, here)

    def _evaluate(self, stage: Stage, batch: Any, batch_idx: int) -> None:
        for name, (sums, counts, _) in self._losses(stage, split_batch(batch), batch_idx).items():
            getattr(self.heads[name], f"{stage}_losses").update(sums, counts)

    def _begin(self, stage: Stage) -> None:
        self._first_empty.pop(stage, None)
        for head in self._heads().values() if stage != "train" else ():
            getattr(head, f"{stage}_losses").reset()

    def _end(self, stage: Stage) -> None:
        first = self._first_empty.pop(stage, None)
        if first is not None and int(first) < _NEVER:
            raise _no_labels(stage, int(first))
        for name, head in self._heads().items():
            for metric_name, metric in head.metrics(stage).items():
                self.log(f"{stage}/{name}/{metric_name}", metric, prog_bar=stage != "train")
        if stage == "train":
            return
        self.task_losses[stage], total = {}, torch.zeros((), device=self.device)
        for name, head in self._heads().items():
            sums, counts = getattr(head, f"{stage}_losses").compute()
            self.task_losses[stage][name] = torch.where(counts > 0, means(sums, counts), torch.nan).cpu()
            # all processes have the same number here; sync_dist tells Lightning so
            self.log(f"{stage}/{name}/loss", reported(sums, counts), sync_dist=True)
            total = total + head.weight * means(sums, counts).mean() if head.weight else total
        self.log(f"{stage}/loss", total, sync_dist=True, prog_bar=True)


def means(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean loss of each task ``(count,)``; 0 for one without a label."""
    return sums / counts.clamp(min=1)


def reported(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean over a head's tasks, as in the objective; NaN where none has a label."""
    return torch.where(counts.any(), means(sums, counts).mean(), torch.nan)


def _no_labels(stage: str, batch_idx: int) -> ValueError:
    return ValueError(
        f"Batch {batch_idx} of {stage} has no label of any task: all are missing, NaN or ignore_index. Leave such samples out of"
        " the data set, or make the batches larger."
    )
