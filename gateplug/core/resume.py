"""Exact resume: the random numbers of a training step as a function of (seed, rank, batch), not of history.

Lightning saves no random states, and a saved state would not help: validation, logging and the making of iterators
draw from the same generators at other moments in a resumed run. So the generators are set anew before every batch,
from numbers that a checkpoint already holds. What comes before the step, the order of the samples and their
augmentation, is made a function in the same way by :func:`gateplug.exact_loader`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn

from gateplug.core.checkpoint import guard, unguard

_MASK64 = (1 << 64) - 1
_MASK63 = (1 << 63) - 1
_STEP, _BETWEEN = 0, 1  # two streams per batch: the step itself, and what runs before it (batch transfer hooks)


def _mix(x: int) -> int:
    """One round of splitmix64: a bijection of 64-bit integers with full avalanche."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def step_seed(seed: int, *numbers: int) -> int:
    """A 63-bit seed that depends on all the numbers and their order, the same on every machine and version.

    The state starts as ``mix(seed)`` and becomes ``mix(state + number)`` for each number, ``mix`` being splitmix64.
    Unlike ``hash()`` it does not change between processes, and neighbouring numbers give unrelated seeds, which
    ``seed + epoch`` does not: there, seed 1 of epoch 0 is seed 0 of epoch 1.

    Args:
        seed: Any integer; taken modulo 2^64.
        numbers: What the random numbers may depend on: epoch, index, rank, …; any integers.

    Returns:
        An integer in [0, 2^63), as ``torch.manual_seed`` and ``torch.Generator.manual_seed`` take it.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014 (splitmix64).
    """
    state = _mix(seed & _MASK64)
    for number in numbers:
        state = _mix((state + number) & _MASK64)
    return state & _MASK63


def seed_everywhere(seed: int) -> None:
    """Set torch's generators (CPU and all accelerators), Python's ``random`` and NumPy's global one."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # manual_seed asks every backend: 0.13 ms a step instead of 0.001
    random.seed(seed)
    try:
        import numpy as np
    except ModuleNotFoundError:  # torch runs without NumPy, and then nobody draws from it
        return
    np.random.seed(seed & 0xFFFFFFFF)


class ExactResume(Callback):
    """Makes a run that was killed and resumed equal, bit for bit, to one that was never killed.

    Before each training batch all global generators are set from a hash of (seed, rank, number of the batch since the
    start of training): torch on all devices, Python's ``random`` and NumPy's global generator, because mixup and the
    like in a ``training_step`` often draw from the latter two. They are set once more after each batch and after
    each validation, so that ``on_after_batch_transfer`` draws the same too. Generators that a user made (a
    ``torch.Generator``, a ``numpy.random.default_rng``) are left alone.

    The order of the data is the loader's business: use :func:`gateplug.exact_loader` or gateplug's data modules. With
    a train loader that keeps no state the callback warns at fit start. Put it first in ``callbacks:``, so that what
    other callbacks draw in ``on_train_batch_start`` is covered. Means that were logged per epoch cover, after a resume
    within an epoch, the rest of the epoch. A checkpoint written on an exception is one batch further in the data than
    in the weights; resume from a regular one. Lightning counts an epoch that ``max_steps`` ended as complete: a checkpoint
    saved after such a ``fit`` has returned resumes with the next epoch (those written during it resume exactly).

    Args:
        seed: Any integer. None: the seed given to ``seed_everything`` (environment variable ``PL_GLOBAL_SEED``),
            else 0. A resumed run continues with the seed of the checkpoint; a warning says so where they differ.

    Raises:
        TypeError: If ``seed`` is not an integer.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"ExactResume(seed={seed!r}): seed must be an integer, or None for the one of seed_everything.")
        self.seed = seed
        self._warned = False

    def _seed(self) -> int:
        if self.seed is None:  # read late: seed_everything may be called after the callback was made
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        return self.seed

    def _set(self, trainer: L.Trainer, ahead: int, stream: int) -> None:
        batch = trainer.fit_loop.epoch_loop.total_batch_idx + ahead
        seed_everywhere(step_seed(self._seed(), trainer.global_rank, batch, stream))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have a checkpoint that was written with plugs checked, also where no plug is in the Trainer."""
        guard(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the check off."""
        unguard(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the check off."""
        unguard(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the generators for what precedes the first batch, and warn of a loader that cannot resume."""
        self._set(trainer, 1, _BETWEEN)
        if self._warned:
            return
        self._warned = True
        if names := stateless_loaders(trainer.train_dataloader):
            rank_zero_warn(
                f"ExactResume: the train dataloader ({', '.join(names)}) keeps no state (it has no state_dict and "
                "load_state_dict), so a run that is resumed within an epoch starts at that epoch's first batches again "
                "and will not be exact. Make it with gateplug.exact_loader(dataset, batch_size)."
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the generators for what precedes the epoch's first batch."""
        self._set(trainer, 1, _BETWEEN)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the generators for this batch. Batches are counted, not optimizer steps: several make one step."""
        self._set(trainer, 0, _STEP)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the generators for what precedes the next batch."""
        self._set(trainer, 1, _BETWEEN)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what a validation between two batches drew."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._set(trainer, 1, _BETWEEN)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Step plateau schedulers in an epoch that was resumed: Lightning leaves them out there.

        It does so because a metric of the training set covers the rest of the epoch only; one of the validation set is whole.
        """
        loop = trainer.fit_loop
        if loop.restarting and any(c.reduce_on_plateau and c.interval == "epoch" for c in trainer.lr_scheduler_configs):
            loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)

    def state_dict(self) -> dict[str, Any]:
        """The seed: all else is in Lightning's own loop state."""
        return {"seed": self._seed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's seed, with a warning if another one was asked for."""
        saved = int(state_dict["seed"])
        if self.seed is not None and self.seed != saved:
            rank_zero_warn(
                f"ExactResume(seed={self.seed}): the checkpoint was trained with seed {saved}, and the resumed run "
                f"continues with {saved}. To train on with other random numbers, load the weights alone."
            )
        self.seed = saved


def stateless_loaders(loaders: Any) -> list[str]:
    """Class names of the loaders in a (nested) collection that have no ``state_dict`` or no ``load_state_dict``."""
    if loaders is None:
        return []
    flat: Iterable[Any] = (loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened
    both = ("state_dict", "load_state_dict")
    return [type(loader).__name__ for loader in flat if not all(callable(getattr(loader, name, None)) for name in both)]
