"""ContinualMetrics: what a training on a stream has kept, measured at every boundary of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from gateplug.continual.metrics import AccuracyMatrix
from gateplug.continual.pictures import draw_matrix, write_matrix
from gateplug.core.answers import Answers
from gateplug.core.batches import labels_of
from gateplug.core.errors import PlugError, whole_numbers
from gateplug.core.stream import Stream, TaskPlug, eval_task, stream_of
from gateplug.core.table import print_table

Predict = Callable[[nn.Module, Any], Tensor]


class ContinualMetrics(TaskPlug):
    """Measure the accuracy on every task after every task of a stream, and log what is made of it.

    Validation runs at the boundaries of tasks, whatever `val_check_interval` says, and at the end. `continual/average_accuracy`,
    `learning_accuracy`, `backward_transfer`, `forgetting`, and where they can be computed `forward_transfer` and `intransigence`
    are logged then; the matrix is drawn and written as CSV at the end. A test logs `continual/test/average_accuracy` and the
    accuracy on each task.

    Args:
        every_task: boundaries from one validation to the next, ≥ 1.
        joint: accuracy on each task of joint training, for intransigence; None: not computed.
        predict: `(module, batch) → logits (B, C)` where the network in the module is not called as a whole; None: what the
            network answered in the module's own validation step.

    Raises:
        ValueError: `every_task` < 1, or an accuracy outside [0, 1].
        PlugError: the data are no stream, or have no validation set.
    """

    room: ClassVar[str] = "continual"
    summary: ClassVar[str] = "measures accuracy on every task after every task: forgetting, transfer, a heat map"
    paper: ClassVar[str] = "arXiv 1706.08840"
    attaches: ClassVar[bool] = False

    def __init__(self, every_task: int = 1, joint: Sequence[float] | None = None, predict: Predict | None = None) -> None:
        whole_numbers(every_task=every_task)
        if every_task < 1:
            raise ValueError(f"every_task={every_task} must be ≥ 1")
        if joint is not None and not all(0 <= value <= 1 for value in joint):
            raise ValueError(f"joint={list(joint)} must be accuracies in [0, 1], one for each task")
        if predict is not None and not callable(predict):
            raise TypeError(f"predict={predict!r} must be a function (module, batch) -> logits, or None")
        self.every_task, self.joint, self.predict = every_task, joint, predict
        self.matrix: AccuracyMatrix | None = None
        """Of validation, of the last fit."""
        self._tested: AccuracyMatrix | None = None
        self._answers: Answers | None = None
        self._row: int | None = None
        self._done = -1
        self._restored: dict[str, Tensor] = {}

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """There must be tasks to measure."""
        if stream_of(trainer) is None:
            raise PlugError(
                "ContinualMetrics measures the tasks of a stream, and the data are none: give the Trainer a gp.TaskStream(…), "
                "or a data module of your own with train_lengths, train_tasks, eval_lengths and task_batches"
            )

    # ------------------------------------------------------------------ a fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the matrix."""
        super().on_fit_start(trainer, pl_module)
        stream = stream_of(trainer)
        assert stream is not None
        if not trainer.enable_validation or not stream.eval_lengths("val"):
            raise PlugError("ContinualMetrics measures on validation data, and there are none: give each task a validation set")
        self.matrix = _matrix(stream, self.joint).to(pl_module.device)
        if self._restored:
            self.matrix.load_state_dict(self._restored)
            self._restored = {}
        else:
            self._done = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate at the next boundary."""
        super().on_train_start(trainer, pl_module)
        self._aim(trainer)
        if self.matrix is not None and self._due() and bool(self.matrix.values[self._done + 1].isnan().all()):
            # the run was killed between the end of a task and its validation, which Lightning does not make up for
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def _due(self) -> bool:
        """Whether the task that is over is one after which a validation stands."""
        return self._done >= 0 and self.task is None and (self._done + 1) % self.every_task == 0

    def on_task_start(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """Validate at the next boundary."""
        self._aim(trainer)

    def _aim(self, trainer: Trainer) -> None:
        stream = stream_of(trainer)
        assert stream is not None
        ends = list(accumulate(stream.train_lengths()))
        stretch = self._stretch or 0
        target = min(stretch - stretch % self.every_task + self.every_task, len(ends)) - 1
        # Lightning validates where the number of batches so far is a multiple of this
        trainer.val_check_batch = ends[target]

    def on_task_end(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """A row can be measured."""
        self._done = self._stretch if self._stretch is not None else -1

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure a row: of the untrained network in the sanity check, else of the task that is over; not within a task."""
        self._row = None
        if self.matrix is None or trainer.state.fn != "fit":
            return
        row = -1 if trainer.sanity_checking else self._done
        if trainer.sanity_checking or self.task is None:
            self._row = row
            self.matrix.restart(row)
            self._listen(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count."""
        if self._row is not None and self.matrix is not None:
            self._count(trainer, pl_module, self.matrix, "val", batch, batch_idx, self._row)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures."""
        self._hush()
        if self._row is None or self._row < 0 or self.matrix is None:
            return
        for name, value in self.matrix.compute().items():
            pl_module.log(f"continual/{name}", value.float(), prog_bar=name == "average_accuracy", rank_zero_only=False)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        stream = stream_of(trainer)
        assert stream is not None
        self._tested = AccuracyMatrix(1 + max(task for task, _ in stream.eval_lengths("test")), 1).to(pl_module.device)
        self._listen(pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count."""
        if self._tested is not None:
            self._count(trainer, pl_module, self._tested, "test", batch, batch_idx, 0)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy on each task, and their mean."""
        self._hush()
        tested, self._tested = self._tested, None
        if tested is not None and (found := tested.compute()):
            pl_module.log("continual/test/average_accuracy", found["average_accuracy"].float())
            for task, value in enumerate([] if tested.seen is None else tested.seen[1].tolist()):
                pl_module.log(f"continual/test/task{task}/accuracy", value)

    def _count(
        self, trainer: Trainer, module: LightningModule, into: AccuracyMatrix, stage: Any, batch: Any, batch_idx: int, row: int
    ) -> None:
        stream = stream_of(trainer)
        task = None if stream is None else eval_task(stream, stage, batch_idx)
        if task is None:
            return
        if self.predict is not None:
            with torch.no_grad():
                logits = self.predict(module, batch)
        else:
            assert self._answers is not None
            logits = self._answers.last.logits
        into.update(logits.detach(), labels_of(batch), task, row)

    def _listen(self, module: LightningModule) -> None:
        if self.predict is None:
            self._answers = Answers(module).__enter__()

    def _hush(self) -> None:
        if self._answers is not None:
            self._answers.__exit__()
            self._answers = None

    # ------------------------------------------------------------------ the end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the figures, draw and write the matrix."""
        assert self.matrix is not None
        figures = self.matrix.compute()
        if figures:
            print_table(
                "Of the stream", ("", "validation"), [(n.replace("_", " "), f"{float(v):.4f}") for n, v in figures.items()]
            )
        stream = stream_of(trainer)
        if stream is not None and self.matrix.seen is not None:
            write_matrix(trainer, self.matrix.seen, stream.train_tasks())
            draw_matrix(trainer, self.matrix.seen[1:], stream.train_tasks())

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        if self.matrix is None:
            return super().state_dict()
        return {**super().state_dict(), "matrix": self.matrix.state_dict(), "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it."""
        super().load_state_dict(state_dict)
        self._restored, self._done = dict(state_dict.get("matrix", {})), state_dict.get("done", -1)

    def _release(self, module: nn.Module) -> None:
        super()._release(module)
        self._hush()


def _matrix(stream: Stream, joint: Sequence[float] | None) -> AccuracyMatrix:
    trained = list(stream.train_tasks())
    tasks = 1 + max(trained)
    once = trained == list(range(tasks))
    return AccuracyMatrix(tasks, None if once else len(trained), None if joint is None else list(joint))
