"""Which outputs of a network belong to which task of a stream, and what the labels become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gateplug.data.stream_kinds import class_groups


class Outputs:
    """The outputs of all tasks.

    Args:
        head: ``domain``, ``task`` or ``class``, see :class:`~gateplug.data.TaskStream`.
        split: Whether a task is a group of the classes of one data set.
        num_tasks: T.
        seed: Of the groups.
        uneven: As in :func:`class_groups`.
        size: Task to the number of classes of its data module.
    """

    def __init__(
        self, head: str, split: bool, num_tasks: int, seed: int | None, uneven: bool, size: Callable[[int], int]
    ) -> None:
        self.head, self.split, self.num_tasks, self.seed, self.uneven, self.size = head, split, num_tasks, seed, uneven, size
        self._groups: list[list[int]] | None = None

    @property
    def groups(self) -> list[list[int]]:
        """The classes of each task of a split data set."""
        if self._groups is None:
            self._groups = class_groups(self.size(0), self.num_tasks, self.seed, self.uneven)
        return self._groups

    def classes(self, task: int) -> list[int]:
        """The outputs of a task."""
        if self.split:
            group = self.groups[task]
            return list(range(len(group))) if self.head == "domain" else group
        start = self._offset(task)
        return list(range(start, start + self.size(task)))

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 + max(c for task in range(self.num_tasks) for c in self.classes(task))

    def relabel(self, task: int) -> Tensor | int | None:
        """How the labels of a task's data become those of the outputs: a table, a number to add, or None for as they are."""
        if not self.split:
            return self._offset(task) or None
        if self.head != "domain":
            return None
        table = torch.full((self.size(0),), -1)
        table[self.groups[task]] = torch.arange(len(self.groups[task]))
        return table

    def _offset(self, task: int) -> int:
        return 0 if self.head == "domain" else sum(self.size(earlier) for earlier in range(task))


def said_classes(module: Any) -> int | None:
    """How many classes a data module says that it has; None where it does not say."""
    size = getattr(module, "num_classes", None)
    return size if isinstance(size, int) else None


def check_same(sizes: list[int | None]) -> None:
    """Raise ValueError where data modules that share the outputs say that they have other numbers of classes."""
    if len(said := {size for size in sizes if size is not None}) > 1:
        raise ValueError(
            f"TaskStream(head='domain'): all tasks share the outputs, and the data modules have {sorted(said)} classes. Use "
            "head='task' or head='class', with gp.HeadMask."
        )
