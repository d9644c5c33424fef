"""Training on one task after another: what a stream of tasks is, and plugs that follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from lightning import LightningModule, Trainer

from gateplug.core.permuted import permutation
from gateplug.core.plug import Plug

__all__ = ["Place", "Stage", "Stream", "TaskPlug", "batch_task", "eval_task", "permutation", "place_in", "stream_of"]

Stage = Literal["val", "test"]


@runtime_checkable
class Stream(Protocol):
    """A data module that gives the batches of one task after another, within one epoch of the Trainer.

    Which task a batch is of follows from its number alone, so nothing has to be added to batches, and a resumed run knows
    where it is.
    """

    def train_lengths(self) -> Sequence[int]:
        """Training batches of each task, in the order of the stream; a task may come again."""
        ...

    def train_tasks(self) -> Sequence[int]:
        """Which task each of these stretches is of: 0 … T − 1 where none comes again."""
        ...

    def eval_lengths(self, stage: Stage) -> Sequence[tuple[int, int]]:
        """(task, batches) of what the loader of a stage gives when it is iterated next, in order."""
        ...

    def task_batches(self, task: int) -> Any:
        """Training batches of one task, once through, in an order that is always the same: for what is measured after it."""
        ...


class Place(NamedTuple):
    """Where a training batch stands in a stream."""

    stretch: int
    """Number of the stretch in the stream."""
    task: int
    first: bool
    last: bool
    """Whether it is the first or last batch of its stretch."""


def stream_of(trainer: Trainer) -> Stream | None:
    """The stream that a Trainer runs on, None for other data."""
    loops = (trainer.fit_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    data = trainer.datamodule  # type: ignore[attr-defined]
    # a Trainer that is given loaders later on still has the data module of before
    return data if isinstance(data, Stream) and any(loop._data_source.instance is data for loop in loops) else None


def place_in(stream: Stream, batch: int) -> Place | None:
    """Where training batch number `batch` of an epoch stands; None past the end."""
    start = 0
    for i, (end, task) in enumerate(zip(accumulate(stream.train_lengths()), stream.train_tasks(), strict=True)):
        if batch < end:
            return Place(i, task, batch == start, batch == end - 1)
        start = end
    return None


def eval_task(stream: Stream, stage: Stage, batch: int) -> int | None:
    """Task of batch number `batch` that the loader of a stage gives; None past the end."""
    for task, length in stream.eval_lengths(stage):
        if batch < length:
            return task
        batch -= length
    return None


class TaskPlug(Plug):
    """A plug that is told when a task of a stream begins and ends.

    A subclass that has `on_train_batch_start` or `on_train_batch_end` of its own calls `super()`'s. Without a stream it is
    told nothing.
    """

    task: int | None = None
    """The task that is being trained."""
    _stretch: int | None = None

    def on_task_start(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """Called before the first batch of a task."""

    def on_task_end(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """Called after the last update of a task, before what is validated then."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A task may begin."""
        stream = stream_of(trainer)
        place = None if stream is None else place_in(stream, batch_idx)
        if place is None or (self._stretch == place.stretch and not (place.first and self.task is None)):
            return
        if self.task is not None:  # a run that was left within a task, and begins anew
            self.on_task_end(trainer, pl_module, self.task)
        self._stretch, self.task = place.stretch, place.task
        self.on_task_start(trainer, pl_module, place.task)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A task may end."""
        stream = stream_of(trainer)
        place = None if stream is None else place_in(stream, batch_idx)
        if place is not None and self.task is not None and (place.last or trainer.is_last_batch):
            self.on_task_end(trainer, pl_module, self.task)
            self.task = None

    def state_dict(self) -> dict[str, Any]:
        """The arguments, and the place in the stream."""
        if self._stretch is None:
            return super().state_dict()
        return {**super().state_dict(), "stream": {"stretch": self._stretch, "task": self.task}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the place."""
        place = state_dict.get("stream", {})
        self._stretch, self.task = place.get("stretch"), place.get("task")


def batch_task(batch: Any) -> int | None:
    """The task that a batch names itself, as a mapping's entry `task`; None where it does not."""
    found = batch.get("task") if isinstance(batch, Mapping) else None
    if isinstance(found, torch.Tensor):
        found = found.flatten()[0].item() if found.numel() else None
    return None if found is None else int(found)
