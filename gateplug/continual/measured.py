"""The part of a plug that EWC and MAS share: importance that is measured on samples of a task when it ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from gateplug.continual.own_steps import answer, undisturbed
from gateplug.continual.penalty import Tensors, held, trained
from gateplug.continual.per_sample import PerSample
from gateplug.continual.pulled import Pulled
from gateplug.core.cost import still
from gateplug.core.errors import PlugError, whole_numbers
from gateplug.core.processes import world_size
from gateplug.core.stream import stream_of


class Measured(Pulled):
    """A plug that measures, at the end of a task, how much each parameter matters to it.

    Samples are the first ones of `task_batches` of the stream. In a distributed run each process measures those of its own share,
    and the mean is over all of them.
    """

    samples: int

    def _start_measured(self, weight: float, samples: int) -> None:
        self._start(weight)
        whole_numbers(samples=samples)
        if samples < 1:
            raise ValueError(f"samples={samples} must be ≥ 1: importance is a mean over so many samples of a task")
        self.samples = samples

    @abstractmethod
    def value(self, logits: Tensor, label: Tensor) -> Tensor:
        """What is differentiated for one sample: logits (C,), label () -> scalar."""

    @abstractmethod
    def mean(self, gradients: Tensor) -> Tensor:
        """Per-sample gradients (N, …) -> importance (…), a mean over the samples."""

    @abstractmethod
    def labels(self, logits: Tensor, batch: Any, places: Tensor, task: int) -> Tensor:
        """Labels (B,) for :meth:`value`, of a batch with logits (B, C); negative: none. `places` (B,) number a task's samples."""

    @abstractmethod
    def hold(self, importance: Tensors, module: nn.Module) -> None:
        """Take the importance that was measured into the penalty."""

    def consolidate(self, module: nn.Module, batches: Iterable[Any], task: int | None = None) -> None:
        """End a task: measure what matters to it, and hold it from now on. For a loop of one's own; with a stream it is done.

        Args:
            module: a LightningModule, or a network that gives logits (B, C).
            batches: of the task, as `training_step` takes them, or (inputs, labels), on the module's device.
            task: its number; None: how many there were.

        Raises:
            PlugError: no labelled sample, or the network is not called as a whole.
        """
        task = self.penalty.tasks if task is None else task
        self.hold(self.measure(module, batches, task), module)

    def on_task_end(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """Measure, on the task's own samples."""
        self.consolidate(module, _transferred(trainer, module, task), task)
        self._log(trainer)

    def measure(self, module: nn.Module, batches: Iterable[Any], task: int) -> Tensors:
        """Importance of each parameter on the first `samples` samples, by name.

        Raises:
            PlugError: there is no sample.
        """
        parameters = trained(module)
        sums = {name: torch.zeros_like(held(p)) for name, p in parameters.items()}
        rank, world = (dist.get_rank(), world_size()) if world_size() > 1 else (0, 1)
        count, wanted = 0, len(range(rank, self.samples, world))
        per_sample: PerSample | None = None
        with undisturbed(module), still(module):
            for batch in batches if wanted else ():
                asked = answer(module, batch)
                places = rank + world * (count + torch.arange(len(asked.logits), device=asked.logits.device))
                labels = self.labels(asked.logits, batch, places, task)
                rows = (labels >= 0).nonzero()[: wanted - count, 0]  # negative: no label
                if per_sample is None:
                    per_sample = PerSample(asked.net, parameters, self.value)
                for gradients in per_sample(asked, labels, rows):
                    for name, g in gradients.items():
                        sums[name] += len(g) * self.mean(g.to(sums[name].dtype))
                count += len(rows)
                if count >= wanted:
                    break
        return _over_all(sums, count, type(self).__name__)


def _transferred(trainer: Trainer, module: LightningModule, task: int) -> Iterator[Any]:
    """Training batches of a task as a training step would get them."""
    stream = stream_of(trainer)
    assert stream is not None
    for raw in stream.task_batches(task):
        ready = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(raw), dataloader_idx=0)
        yield trainer.strategy.batch_to_device(ready, dataloader_idx=0)


def _over_all(sums: Tensors, count: int, owner: str) -> Tensors:
    total = torch.tensor(float(count))
    if world_size() > 1:
        total = total.to(next(iter(sums.values())).device)
        for t in (total, *sums.values()):
            dist.all_reduce(t)
    if not total:
        raise PlugError(f"{owner}: the task that ends has no labelled sample to measure importance on")
    return {name: t / float(total) for name, t in sums.items()}
