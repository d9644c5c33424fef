"""A stream made of whatever loaders a Trainer has been given, for plugs that follow one."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning import LightningDataModule

import gateplug as gp
from gateplug.core.stream import Stage


class Halves(LightningDataModule):
    """The first half of the training batches is task 0, the second half task 1; what is evaluated is task 0. All classes count."""

    num_tasks, num_classes = 2, 10

    def __init__(self, loaders: dict[str, Any], head: str = "class") -> None:
        super().__init__()
        self.loaders, self.head = loaders, head

    def classes(self, task: int) -> list[int]:
        return list(range(10))

    def train_lengths(self) -> list[int]:
        n = len(self.loaders["train"])
        return [n // 2, n - n // 2]

    def train_tasks(self) -> list[int]:
        return [0, 1]

    def eval_lengths(self, stage: Stage) -> list[tuple[int, int]]:
        return [(0, len(self.loaders[stage]))]

    def task_batches(self, task: int) -> Any:
        used = self.loaders["train"]  # which is in the middle of an epoch: another one over the same samples
        return gp.exact_loader(used.dataset.dataset, used.batch_size, shuffle=False)

    def train_dataloader(self) -> Any:
        return self.loaders["train"]

    def val_dataloader(self) -> Any:
        return self.loaders["val"]

    def test_dataloader(self) -> Any:
        return self.loaders["test"]


class Streamed(gp.Plug):
    """Stands before a plug in the callbacks and gives it a stream."""

    room: ClassVar[str] = "continual"
    attaches: ClassVar[bool] = False

    def __init__(self, head: str = "class", validate: bool = False) -> None:
        self.head, self.validate = head, validate

    def check(self, trainer: Any, module: Any) -> None:
        loops = {"train": trainer.fit_loop, "val": trainer.fit_loop.epoch_loop.val_loop, "test": trainer.test_loop}
        found = {name: loop._data_source.instance for name, loop in loops.items()}
        loaders = {name: data.loaders[name] if isinstance(data, Halves) else data for name, data in found.items()}
        if self.validate and loaders["train"] is not module and (loaders["val"] is None or loaders["val"] is module):
            train = loaders["train"]
            loaders["val"] = gp.exact_loader(train.dataset.dataset, train.batch_size, shuffle=False)
        trainer.datamodule = halves = Halves(loaders, self.head)
        halves.trainer = trainer
        for name, loop in loops.items():
            if loaders[name] is not None and loaders[name] is not module:
                loop._data_source.instance = halves
