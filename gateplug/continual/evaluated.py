"""The part of GateON that evaluates: every batch in the context of its task."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer

from gateplug.continual.contexts import Contexts
from gateplug.core.errors import PlugError
from gateplug.core.stream import Stage, batch_task, eval_task, stream_of


def is_led(trainer: Trainer) -> bool:
    """Whether a detector says which context it is."""
    return any(type(c).__name__ == "ContextDetector" for c in trainer.callbacks)  # type: ignore[attr-defined]


class EvaluatedContexts(Contexts):
    """What :class:`GateON` does in validation, test and prediction."""

    _before: int = 0
    """The context in which the network ran before an evaluation."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run the batch in its context."""
        self._evaluate(trainer, pl_module, "val", batch, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run the batch in its context."""
        self._evaluate(trainer, pl_module, "test", batch, batch_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run the batch in its context."""
        self._evaluate(trainer, pl_module, "test", batch, batch_idx)

    def _evaluate(self, trainer: Trainer, module: LightningModule, stage: Stage, batch: Any, batch_idx: int) -> None:
        if is_led(trainer):
            return
        stream = stream_of(trainer)
        task = batch_task(batch) if stream is None else eval_task(stream, stage, batch_idx)
        if task is None:  # nobody says: in a fit what is trained, else what was shown last
            if trainer.state.fn == "fit":
                self.show(module, self.context)
            return
        # a checkpoint of weights alone does not say which context a task was trained in: tasks open contexts in their order
        order = list(dict.fromkeys(stream.train_tasks())) if stream is not None else [task]
        unknown = order.index(task) if stream is not None and task in order else task
        context = self._context_of.get(task, None if self._context_of else unknown)
        if context is not None and context < self.known:
            self.show(module, context)
        elif stage == "val":  # a task to come: what the network makes of it now
            self.show(module, self.context)
        else:
            raise PlugError(
                f"GateON: task {task} is unknown at test: no context was trained on it. Known are the tasks "
                f"{sorted(self._context_of) or list(range(self.known))}"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what the network runs in."""
        self._before = self._gates[0].active

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As it was."""
        self.show(pl_module, self._before)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what the network runs in."""
        self._before = self._gates[0].active

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As it was."""
        self.show(pl_module, self._before)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what the network runs in."""
        self._before = self._gates[0].active

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As it was."""
        self.show(pl_module, self._before)
