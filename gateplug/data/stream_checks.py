"""What a stream cannot be made of, and what it cannot be trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from gateplug.core.errors import PlugError, nearest, whole_numbers

KINDS = ("permuted", "rotated", "class_split", "domains")
HEADS = ("domain", "task", "class")
_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def check_parts(tasks: Any, base: Any, kind: str | None, num_tasks: int | None) -> None:
    """Raise for a stream that is not said, or said twice.

    Raises:
        TypeError: For what is no data module.
        ValueError: For all else.
    """
    if (tasks is None) == (base is None):
        raise ValueError(
            "TaskStream: give either tasks=[…], a data module for each task, or base=…, one data module that kind= and "
            f"num_tasks= make tasks of; {'both' if base is not None else 'neither'} is given."
        )
    modules = [base] if tasks is None else list(tasks)
    if not modules:
        raise ValueError("TaskStream(tasks=[]): a stream needs at least one task.")
    if wrong := [type(m).__name__ for m in modules if not isinstance(m, LightningDataModule)]:
        raise TypeError(f"TaskStream: a {wrong[0]} was given where a LightningDataModule is needed.")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"TaskStream(kind={kind!r}): allowed are {', '.join(map(repr, KINDS))}.{nearest(str(kind), KINDS)}")
    if tasks is not None:
        if kind not in (None, "domains") or num_tasks not in (None, len(modules)):
            raise ValueError(
                f"TaskStream(kind={kind!r}, num_tasks={num_tasks}): a list of {len(modules)} data modules says both by itself. "
                "Leave them out, or give one data module as base=."
            )
    elif kind in (None, "domains") or num_tasks is None:
        raise ValueError(
            f"TaskStream(kind={kind!r}, num_tasks={num_tasks}): base needs num_tasks, and a kind, 'permuted', 'rotated' or "
            "'class_split'. For domains give a list of data modules as tasks=."
        )
    else:
        whole_numbers(num_tasks=num_tasks)
        if num_tasks < 1:
            raise ValueError(f"TaskStream(num_tasks={num_tasks}): a stream needs at least one task.")
    for module in modules:
        if own := [name for name in _TRANSFER if is_overridden(name, module, LightningDataModule)]:
            raise ValueError(
                f"TaskStream: {type(module).__name__} has {own[0]}, which Lightning would not call here. Do it in the data set, "
                "the collate function or the LightningModule."
            )


def check_lengths(steps_per_task: int | None, epochs_per_task: int | None) -> None:
    """Raise ValueError unless one of the two is given, and is a whole number from 1."""
    if (steps_per_task is None) == (epochs_per_task is None):
        raise ValueError(
            f"TaskStream(steps_per_task={steps_per_task}, epochs_per_task={epochs_per_task}): give exactly one, how many "
            "training batches a task lasts or how many passes over its data."
        )
    for name, value in (("steps_per_task", steps_per_task), ("epochs_per_task", epochs_per_task)):
        if value is not None:
            whole_numbers(**{name: value})
            if value < 1:
                raise ValueError(f"TaskStream({name}={value}): it must be at least 1.")


def check_choices(kind: str, head: str, order: Sequence[int] | None, num_tasks: int, uneven: bool, seed: Any) -> None:
    """Raise for a head, order, cut or seed that there is not."""
    if head not in HEADS:
        raise ValueError(f"TaskStream(head={head!r}): allowed are {', '.join(map(repr, HEADS))}.{nearest(str(head), HEADS)}")
    if order is not None:
        whole_numbers(**{f"order[{i}]": task for i, task in enumerate(order)})
        if not order or not all(0 <= task < num_tasks for task in order):
            raise ValueError(f"TaskStream(order={order}): at least one task, each of 0 … {num_tasks - 1}.")
    if uneven and kind != "class_split":
        raise ValueError(f"TaskStream(uneven=True): it says how classes are cut, and kind={kind!r} cuts none.")
    if seed is None and kind != "class_split":
        raise ValueError(
            f"TaskStream(seed=None): for kind='class_split' alone (its classes in order); kind={kind!r} needs a number."
        )
    if seed is not None:
        whole_numbers(seed=seed)


def check_trainer(trainer: Trainer, lengths: Sequence[int], tasks: Sequence[int]) -> None:
    """Raise where the Trainer would mix tasks; warn where it would pass the stream several times.

    Raises:
        ValueError: A stretch is no whole number of accumulated batches.
    """
    if fraction := getattr(trainer, "overfit_batches", 0):
        raise ValueError(
            f"Trainer(overfit_batches={fraction}) trains on the first batches of a loader, those of a stream's "
            "first task. Use a small steps_per_task."
        )
    windows = {trainer.accumulate_grad_batches}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            windows |= set(callback.scheduling.values())
    for window in sorted(windows):
        for task, length in zip(tasks, lengths, strict=True):
            if length % window:
                raise ValueError(
                    f"accumulate_grad_batches={window} does not divide the {length} training batches of task {task}: one update "
                    "would mix two tasks. Choose steps_per_task (or batch size and accumulation) so that it does."
                )
    if trainer.max_epochs != 1 and trainer.max_steps == -1:
        times = "again and again" if trainer.max_epochs in (None, -1) else f"{trainer.max_epochs} times"
        rank_zero_warn(
            f"Trainer(max_epochs={trainer.max_epochs}): an epoch is a pass over the whole stream of {len(tasks)} tasks, which "
            f"would be passed {times}. Continual learning is max_epochs=1, with the length of a task in the TaskStream."
        )


def check_masked(trainer: Trainer, head: str) -> None:
    """Raise PlugError where nothing masks the outputs of several heads."""
    names = {cls.__name__ for callback in trainer.callbacks for cls in type(callback).__mro__}  # type: ignore[attr-defined]
    if head != "domain" and "HeadMask" not in names:
        raise PlugError(
            f"TaskStream(head={head!r}): the network has outputs of several tasks, and nothing masks those that do not count. "
            "Add gp.HeadMask() to the Trainer's callbacks, or use head='domain'."
        )
