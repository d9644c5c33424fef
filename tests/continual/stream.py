"""A small stream of tasks: scikit-learn's digits with the pixels of each task in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gateplug as gp
from gateplug.core.stream import Stage, permutation

SIZES = {"samples": 48, "steps": 6, "batch_size": 8}
"""A stream that is over in a moment."""


class PermutedDigits(L.LightningDataModule):
    """`tasks` stretches of `steps` batches in one epoch; each task has the same `samples` digits, others for the tests."""

    def __init__(self, tasks: int = 3, samples: int = 1000, steps: int = 60, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.tasks, self.samples, self.steps, self.batch_size, self.seed = tasks, samples, steps, batch_size, seed
        data = load_digits()
        order = permutation(seed, 1, len(data.target))
        self.x, self.y = torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]

    def pixels(self, task: int, rows: Tensor) -> Tensor:
        return self.x[rows][:, permutation(self.seed, task, 64)]

    def train_lengths(self) -> Sequence[int]:
        return [self.steps] * self.tasks

    def train_tasks(self) -> Sequence[int]:
        return range(self.tasks)

    def eval_lengths(self, stage: Stage) -> Sequence[tuple[int, int]]:
        return [(t, 1) for t in range(self.tasks)]

    def order(self, task: int) -> Tensor:
        """Digits of a task's batches, epoch after epoch in another order."""
        needed = self.steps * self.batch_size * self.world
        epochs = [permutation(self.seed + 100 * task, 1 + e, self.samples) for e in range(-(-needed // self.samples))]
        return torch.cat(epochs)[:needed]

    @property
    def world(self) -> int:
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    def items(self, task: int, rows: Tensor) -> list[Any]:
        return list(zip(self.pixels(task, rows), self.y[rows], strict=True))

    def loader(self, items: list[Any], batch_size: int) -> Any:
        return gp.exact_loader(items, batch_size, shuffle=False, training=True, seed=self.seed)

    def train_dataloader(self) -> Any:
        return self.loader([item for t in range(self.tasks) for item in self.items(t, self.order(t))], self.batch_size)

    def task_batches(self, task: int) -> Any:
        return self.loader(self.items(task, torch.arange(self.samples)), self.batch_size)

    def test_set(self, task: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(self.samples, len(self.y))
        return self.pixels(task, rows), self.y[rows]

    def accuracies(self, module: nn.Module) -> list[float]:
        """On the test digits of each task."""
        module.eval()
        with torch.no_grad():
            sets = [self.test_set(t) for t in range(self.tasks)]
            return [float((module(x).argmax(-1) == y).float().mean()) for x, y in sets]


class Digits(L.LightningModule):
    """Somebody's small classifier; `optimizer` names what trains it."""

    def __init__(self, hidden: int = 32, optimizer: str = "sgd", lr: float = 0.05, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )
        self.optimizer, self.lr = optimizer, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        kinds = {
            "sgd": lambda p: torch.optim.SGD(p, lr=self.lr),
            "momentum": lambda p: torch.optim.SGD(p, lr=self.lr, momentum=0.9, weight_decay=0.01),
            "adam": lambda p: torch.optim.Adam(p, lr=self.lr),
            "adamw": lambda p: torch.optim.AdamW(p, lr=self.lr, weight_decay=0.1),
        }
        return kinds[self.optimizer](self.parameters())


def fit(
    plugs: Sequence[Any], tmp: Any, data: PermutedDigits | None = None, module: L.LightningModule | None = None, **kwargs: Any
) -> Any:
    """Train a module from one seed through a stream."""
    from tests.modules import trainer

    L.seed_everything(1, verbose=False)
    if module is None:
        module = Digits()
    t = trainer(tmp, callbacks=[*plugs, gp.ExactResume()], **{"max_epochs": 1, **kwargs})
    t.fit(module, datamodule=data or PermutedDigits(**SIZES))
    return module
