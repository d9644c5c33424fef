"""TaskStream: one task after another in one `trainer.fit`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from gateplug.core.errors import listed
from gateplug.core.stream import Stage
from gateplug.data.loader import ExactLoader
from gateplug.data.module import Split
from gateplug.data.stream_checks import check_choices, check_lengths, check_masked, check_parts, check_trainer
from gateplug.data.stream_heads import Outputs, check_same, said_classes
from gateplug.data.stream_kinds import Permute, Rotate, View
from gateplug.data.stream_labels import dataset_labels
from gateplug.data.stream_loader import StreamLoader, Stretch, TaskLoader, begun
from gateplug.data.stream_source import Source, exact, grouped, loader_of, measuring

_STAGES: dict[Split, tuple[str, ...]] = {"train": ("fit",), "val": ("validate", "fit"), "test": ("test", "predict")}


class TaskStream(LightningDataModule):
    """Data whose task changes while they are trained on, for continual learning.

    Tasks are either data modules of your own, or made of one data module:

    - ``permuted``: task 0 is the data as they are; every other task has one permutation of the pixels;
    - ``rotated``: task t of T is turned by t·180/T degrees counterclockwise, bilinear, black coming in from outside. The black of
      normalised images is that of the data module's ``mean`` and ``std``;
    - ``class_split``: the classes are shuffled by seed (``seed=None``: not) and cut into T groups.

    The changes are made on the batch, after what the data module does, so one set of worker processes serves all tasks. An
    epoch of the Trainer is the whole stream, ``max_epochs=1``; batches do not say which task they are of, and plugs know it from
    the number of the batch. Validation during a fit gives the tasks that have begun, all else gives all tasks, in order.

    Loaders are gateplug's, or DataLoaders over map-style data sets, which become exact (:func:`gateplug.exact_loader`);
    a run is resumed at any batch, bit for bit.

    Args:
        tasks: A data module for each task.
        base: One data module, of which ``kind`` makes ``num_tasks`` tasks.
        kind: See above; with ``tasks`` it is ``domains``.
        num_tasks: T ≥ 1.
        steps_per_task: Training batches a stretch, ≥ 1.
        epochs_per_task: Or passes over the task's data, ≥ 1.
        head: ``domain``: all tasks have the same outputs. ``task``: each task has its own, labels being y + t·C (in
            ``class_split`` the classes as they are), and the task is known. ``class``: the same outputs, and all classes that
            were seen so far count. ``task`` and ``class`` need :class:`gateplug.HeadMask` and a network
            of ``num_classes`` outputs.
        order: The tasks in the order in which they are trained, e.g. ``[0, 1, 0, 2]``; None: 0 … T − 1.
        forward: Whether validation gives the tasks that have not begun, too.
        task_in_batch: Whether batches name their task: a mapping under ``task``, int64 ``(B,)``; (x, y) become (x, y, task).
        uneven: Whether groups of classes may differ in size by one.
        seed: Of the permutations, of the groups of classes, and of the order of loaders that are not gateplug's.

    Raises:
        TypeError: For an argument or a loader of a wrong kind.
        ValueError: For arguments that do not go together or out of range, tasks without training data or with other classes.
        PlugError: For ``head="task"`` or ``"class"`` without a HeadMask in the Trainer.
    """

    def __init__(
        self,
        tasks: list[LightningDataModule] | None = None,
        base: LightningDataModule | None = None,
        kind: Literal["permuted", "rotated", "class_split", "domains"] | None = None,
        num_tasks: int | None = None,
        steps_per_task: int | None = None,
        epochs_per_task: int | None = None,
        head: Literal["domain", "task", "class"] = "domain",
        order: list[int] | None = None,
        forward: bool = False,
        task_in_batch: bool = False,
        uneven: bool = False,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        check_parts(tasks, base, kind, num_tasks)
        self.num_tasks: int = num_tasks or len(tasks or ())
        check_lengths(steps_per_task, epochs_per_task)
        check_choices(kind or "domains", head, order, self.num_tasks, uneven, seed)
        self.tasks, self.base, self.kind = tasks, base, kind or "domains"
        self.steps_per_task, self.epochs_per_task, self.head, self.order = steps_per_task, epochs_per_task, head, order
        self.forward, self.task_in_batch, self.uneven, self.seed = forward, task_in_batch, uneven, seed
        self._modules: list[LightningDataModule] = tasks or ([base] if base is not None else [])
        self._outputs = Outputs(head, kind == "class_split", self.num_tasks, seed, uneven, self._size)
        self.prepare_data_per_node = any(module.prepare_data_per_node for module in self._modules)
        self._done: set[tuple[int, str | None]] = set()
        self._loaders: dict[tuple[int, Split], ExactLoader | None] = {}
        self._parts: dict[Split, dict[int, tuple[Source, View]]] = {}
        self._lengths: list[int] | None = None

    # ------------------------------------------------------------------ what the tasks are

    @property
    def num_classes(self) -> int:
        """Outputs that the network needs."""
        return self._outputs.count

    def classes(self, task: int) -> list[int]:
        """The outputs that belong to a task."""
        return self._outputs.classes(task)

    def train_tasks(self) -> list[int]:
        """The task of each stretch."""
        return list(range(self.num_tasks)) if self.order is None else list(self.order)

    def train_lengths(self) -> list[int]:
        """Training batches of each stretch, on each process."""
        if self._lengths is None:
            self._lengths = self._count()
        return self._lengths

    def eval_lengths(self, stage: Stage) -> list[tuple[int, int]]:
        """(task, batches) of what the next iteration over a stage's loader gives."""
        parts = self._split(stage)
        chosen = self._shown() if stage == "val" else range(self.num_tasks)
        return [(task, parts[task][0].length(task)) for task in chosen if task in parts]

    def task_batches(self, task: int) -> TaskLoader:
        """Training batches of a task once through, in the order of epoch 0, images not augmented."""
        source, view = self._split("train")[task]
        return TaskLoader({task: (Source(measuring(source.loader), source.owner), view)}, lambda: [task])

    # ------------------------------------------------------------------ what Lightning calls

    def prepare_data(self) -> None:
        """Have each data module fetch its data."""
        for module in dict.fromkeys(self._modules):
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up each data module, once a stage and run, and check the Trainer."""
        self._set_up(stage)
        if stage in (None, "fit"):
            if self.head == "domain":
                check_same([said_classes(module) for module in self._modules])
            self._lengths = self._count()  # anew: processes may have been started since
        if self.trainer is not None:
            check_masked(self.trainer, self.head)
            if stage in (None, "fit"):
                check_trainer(self.trainer, self.train_lengths(), self.train_tasks())

    def teardown(self, stage: str) -> None:
        """Have each data module clean up; another run sets it up anew."""
        self._done, self._loaders, self._parts = set(), {}, {}
        for module in dict.fromkeys(self._modules):
            module.teardown(stage)

    def state_dict(self) -> dict[str, Any]:
        """What the data modules themselves keep."""
        return {str(i): state for i, module in enumerate(self._modules) if (state := module.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give it back to them."""
        for i, state in state_dict.items():
            self._modules[int(i)].load_state_dict(state)

    def _set_up(self, stage: str | None) -> None:
        for module in self._modules:
            module.trainer = self.trainer
            if not {(id(module), stage), (id(module), None)} & self._done:
                module.setup(stage)  # type: ignore[arg-type]
                self._done.add((id(module), stage))

    def train_dataloader(self) -> StreamLoader:
        """Training batches of the whole stream."""
        parts = self._split("train")
        stretches = [Stretch(t, *parts[t], n) for t, n in zip(self.train_tasks(), self.train_lengths(), strict=True)]
        return StreamLoader(stretches, {"kind": self.kind, "head": self.head, "seed": self.seed})

    def val_dataloader(self) -> Any:
        """Validation batches of the tasks that have begun; empty if there is no such set."""
        return TaskLoader(parts, self._shown) if (parts := self._split("val")) else []

    def test_dataloader(self) -> Any:
        """Test batches of all tasks; empty if there is no test set."""
        return TaskLoader(parts, lambda: range(self.num_tasks)) if (parts := self._split("test")) else []

    def predict_dataloader(self) -> Any:
        """The test batches."""
        return self.test_dataloader()

    # ------------------------------------------------------------------ parts

    def _shown(self) -> list[int]:
        """The tasks that validation gives now."""
        trainer, tasks = self.trainer, self.train_tasks()
        if self.forward or trainer is None or trainer.state.fn != "fit":
            return list(range(self.num_tasks))
        return begun(trainer, tasks, self.train_lengths())

    def _count(self) -> list[int]:
        parts = self._split("train")
        for task in self.train_tasks():
            if not (source := parts[task][0]).length(task):
                raise ValueError(f"TaskStream: task {task} ({source.owner}) has no training data, or not one full batch.")
        lengths = {t: self.steps_per_task or (self.epochs_per_task or 1) * parts[t][0].length(t) for t in self.train_tasks()}
        return [lengths[t] for t in self.train_tasks()]

    def _split(self, split: Split) -> dict[int, tuple[Source, View]]:
        """Source and view of each task that has such a split, made at the first use."""
        if split not in self._parts:
            sources = {id(module): self._source(module, split) for module in self._modules}
            of = [sources[id(self._modules[t % len(self._modules)])] for t in range(self.num_tasks)]
            self._parts[split] = {t: (source, self._view(t)) for t, source in enumerate(of) if source is not None}
            if any(of) and not all(of):
                names = listed(t for t, source in enumerate(of) if source is None)
                rank_zero_warn(f"TaskStream: there is no {split} set for some tasks, which are left out there: {names}.")
        return self._parts[split]

    def _source(self, module: LightningDataModule, split: Split) -> Source | None:
        loader, owner = self._loader(module, split), type(module).__name__
        if loader is not None and self.kind == "class_split":
            labels = dataset_labels(loader.dataset, owner)
            loader = grouped(loader, [torch.isin(labels, torch.tensor(g)).nonzero()[:, 0] for g in self._outputs.groups])
        return None if loader is None else Source(loader, owner)

    def _loader(self, module: LightningDataModule, split: Split) -> ExactLoader | None:
        key = (id(module), split)
        if key not in self._loaders:
            if not any((id(module), stage) in self._done for stage in (*_STAGES[split], None)):
                self._set_up(_STAGES[split][0])
            made = loader_of(module, split)
            self._loaders[key] = None if made is None else exact(made, type(module).__name__, self.seed or 0, split == "train")
        return self._loaders[key]

    def _view(self, task: int) -> View:
        change: Permute | Rotate | None = None
        if self.kind == "permuted" and self.seed is not None:
            change = Permute(self.seed, task)
        elif self.kind == "rotated":
            change = Rotate(task * 180 / self.num_tasks, getattr(self.base, "mean", None), getattr(self.base, "std", None))
        return View(task, change, self._outputs.relabel(task), self.task_in_batch)

    def _size(self, task: int) -> int:
        """Classes of a task's data module; of one that does not say it, the largest training label + 1."""
        module = self._modules[task % len(self._modules)]
        if (said := said_classes(module)) is not None:
            return said
        loader = self._loader(module, "train")
        assert loader is not None
        return int(dataset_labels(loader.dataset, type(module).__name__).max()) + 1
