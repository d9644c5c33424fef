"""What the tests of GateON train: small networks on a stream of permuted digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gateplug as gp
from gateplug.continual.functional import parameter_relevance
from gateplug.continual.layers import Availability
from tests.modules import trainer


def dense(bn: bool = False, hidden: int = 24, second: int = 16) -> nn.Sequential:
    """Two hidden layers, with a BatchNorm behind the first if asked for."""
    norm = [nn.BatchNorm1d(hidden)] if bn else []
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, hidden), *norm, nn.ReLU(), nn.Linear(hidden, second), nn.ReLU(), nn.Linear(second, 10)
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.002, momentum=0.9, weight_decay=0.01),
}


class Learner(L.LightningModule):
    """Somebody's classifier of images in a mapping."""

    def __init__(self, net: nn.Module | None = None, optimizer: str = "adamw", named: bool = False) -> None:
        super().__init__()
        self.net = dense() if net is None else net
        self.optimizer, self.named = optimizer, named

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out if isinstance(out, Tensor) else out.logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["pixel_values"]), batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self(batch["pixel_values"]).argmax(-1) == batch["labels"]).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.named_parameters() if self.named else self.parameters())


def stream(tasks: int = 3, steps: int = 6, batch_size: int = 16, **kwargs: Any) -> gp.TaskStream:
    """Permuted digits, a task over in a moment."""
    base = gp.Digits(batch_size=batch_size, val_fraction=0.01, test_fraction=0.05)
    return gp.TaskStream(base=base, kind="permuted", num_tasks=tasks, steps_per_task=steps, **kwargs)


def train(
    plugs: Sequence[Any], tmp: Path, module: L.LightningModule | None = None, data: Any = None, **kwargs: Any
) -> L.LightningModule:
    """Train from one seed through a stream, without validation."""
    L.seed_everything(1, verbose=False)
    module = module or Learner()
    fit = {"ckpt_path": kwargs.pop("ckpt_path", None)}
    settings = {"max_epochs": 1, "limit_val_batches": 0, **kwargs}
    trainer(tmp, callbacks=[*plugs, gp.ExactResume()], **settings).fit(module, datamodule=data or stream(), **fit)
    return module


def seeded(make: Callable[..., Any], *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """Something that is made from random numbers, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args, **kwargs)


class Spy:
    """Notes what each availability is stepped by; use it as a context."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Spy:
        self._step = step = Availability.step
        seen = self.seen

        def note(a: Availability, relevance: Tensor, eta: float, reactivation: float) -> None:
            seen.setdefault(id(a), []).append(relevance.clone())
            step(a, relevance, eta, reactivation)

        self._step_by = step_by = Availability.step_by

        def note_by(a: Availability, weight: Tensor, grad: Tensor, eta: float, reactivation: float) -> None:
            seen.setdefault(id(a), []).append(parameter_relevance(weight.detach().float(), grad.float()))
            step_by(a, weight, grad, eta, reactivation)

        Availability.step = note  # type: ignore[method-assign]
        Availability.step_by = note_by  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Availability.step = self._step  # type: ignore[method-assign]
        Availability.step_by = self._step_by  # type: ignore[method-assign]

    def of(self, a: Availability) -> Tensor:
        """Relevance in the last step, over its mean."""
        last = self.seen[id(a)][-1]
        return last / last.mean()
