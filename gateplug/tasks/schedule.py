"""Learning-rate schedules that know how long the training is.

An optimizer and a scheduler reach a task as callables, because both are built after plugs have added parameters.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import lightning as L
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

OptimizerCallable = Callable[[Iterable[Tensor]], Optimizer]
SchedulerCallable = Callable[[Optimizer], LRScheduler]


class WarmupCosineLR(LambdaLR):
    r"""Linear warm-up, then half a cosine down to ``final`` of the optimizer's learning rate.

    With :math:`w` = ``warmup · total_steps`` and :math:`T` = ``total_steps``, the factor at step :math:`t` is
    :math:`(t + 1) / w` for :math:`t < w`, then
    :math:`f + (1 - f)\,(1 + \cos(\pi\,(t - w) / (T - w))) / 2` with :math:`f` = ``final``.

    Args:
        optimizer: The optimizer whose learning rate is scheduled.
        total_steps: Number of optimizer steps; 0 is filled in by a gateplug task from the Trainer.
        warmup: Fraction of the steps that warm up, in [0, 1).
        final: Fraction of the learning rate at the end, in [0, 1].

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int = 0, warmup: float = 0.05, final: float = 0.0) -> None:
        if total_steps < 1:
            raise ValueError(
                f"WarmupCosineLR needs total_steps ≥ 1, got {total_steps}; gateplug's tasks fill it in, elsewhere pass"
                " `trainer.estimated_stepping_batches`."
            )
        if not 0 <= warmup < 1 or not 0 <= final <= 1:
            raise ValueError(f"WarmupCosineLR needs 0 ≤ warmup < 1 and 0 ≤ final ≤ 1, got {warmup} and {final}.")
        rising = round(warmup * total_steps)

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            progress = min(1.0, (step - rising) / max(1, total_steps - rising))
            return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

        super().__init__(optimizer, factor)


# The argument in which a schedule wants its length in steps. A length of 0 or less asks for the training's length.
LENGTH_ARGUMENT: dict[type[LRScheduler], str] = {
    OneCycleLR: "total_steps",
    CosineAnnealingLR: "T_max",
    WarmupCosineLR: "total_steps",
}
# Schedules that only make sense per step, whether their length was given or filled in.
PER_STEP = (OneCycleLR, WarmupCosineLR)


def schedule_config(make: SchedulerCallable, optimizer: Optimizer, trainer: L.Trainer) -> dict[str, Any]:
    """Build a scheduler and say how Lightning should run it.

    - A schedule that needs its length and was not given it (``OneCycleLR`` without ``total_steps``,
      ``CosineAnnealingLR`` without ``T_max`` or with ``T_max=-1``, :class:`WarmupCosineLR`) gets
      ``trainer.estimated_stepping_batches`` and steps after every optimizer step.
    - ``ReduceLROnPlateau`` watches its ``monitor`` (``lightning.pytorch.cli``'s has one), else ``val/loss``.
    - All others step after every epoch, as is Lightning's default.

    Args:
        make: ``optimizer -> scheduler``: a class, a ``functools.partial`` of one, or any function.
        optimizer: The optimizer to schedule.
        trainer: The Trainer that runs the training.

    Returns:
        The ``lr_scheduler`` part of what ``configure_optimizers`` returns.

    Raises:
        ValueError: If the length is needed but the training has no end.
    """
    kind, given = _class_and_arguments(make)
    name = next((LENGTH_ARGUMENT[c] for c in LENGTH_ARGUMENT if kind and issubclass(kind, c)), None)
    fill = name is not None and _is_open(given.get(name)) and given.get("epochs") is None
    if fill:
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                f"{kind.__name__ if kind else 'The scheduler'} needs the number of training steps, but the Trainer has"
                f" no end (max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}). Set one of them, or give"
                f" `{name}`."
            )
        scheduler = cast(Callable[..., LRScheduler], make)(optimizer, **{cast(str, name): int(steps)})
    else:
        scheduler = make(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "monitor": getattr(scheduler, "monitor", "val/loss"), "interval": "epoch"}
    return {"scheduler": scheduler, "interval": "step" if fill or isinstance(scheduler, PER_STEP) else "epoch"}


def _is_open(length: Any) -> bool:
    return length is None or (isinstance(length, int) and length <= 0)


def _class_and_arguments(make: SchedulerCallable) -> tuple[type[LRScheduler] | None, dict[str, Any]]:
    """The scheduler class behind a callable, and its keyword arguments; (None, {}) for a function of the user's."""
    if isinstance(make, functools.partial):
        # jsonargparse passes the class as an argument of its instantiator, people pass it as the function.
        for candidate in (make.func, *make.args):
            if isinstance(candidate, type) and issubclass(candidate, LRScheduler):
                return candidate, dict(make.keywords)
        return None, {}
    return (make, {}) if isinstance(make, type) and issubclass(make, LRScheduler) else (None, {})
