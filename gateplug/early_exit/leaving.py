"""The part of EarlyExit that runs tests and predictions, in which samples really leave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from gateplug.core.wrap import unwrap, wrap
from gateplug.early_exit.judging import JudgedExits
from gateplug.early_exit.runner import ExitRunner
from gateplug.early_exit.schedule import Schedule
from gateplug.early_exit.tested import TestRecords


class LeavingExits(JudgedExits):
    """What :class:`EarlyExit` does in test and prediction."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on samples leave."""
        self._run_early(pl_module)
        self._tested = TestRecords(len(self._branches) + 1, self._conformal or self._restored.get("conformal", {}))
        self._tested.to(pl_module.device)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The network as it was."""
        unwrap(self._net, self)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record."""
        if self._tested is not None:
            self._tested.update(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log who left where, and what can be believed of the answers."""
        tested, self._tested = self._tested, None
        if tested is not None:
            cost = torch.tensor([*(float(branch.cost) for branch in self._branches), 1.0]).double()
            for name, value in tested.result(cost).items():
                pl_module.log(f"early_exit/test/{name}", value, sync_dist=True)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on samples leave."""
        self._run_early(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The network as it was."""
        unwrap(self._net, self)

    def _run_early(self, module: LightningModule) -> None:
        trained = self._schedule if self._schedule is not None else self._restored.get("schedule")
        warm = trained.warm if isinstance(trained, Schedule) else trained is None or bool(trained["warm"])
        if warm and self.gate == "jei":
            rank_zero_warn("EarlyExit: no phase of gates was run, so the gates that decide who leaves are untrained")
        runner = ExitRunner(module)
        wrap(self._net, "forward", self, partial(self._early, runner))

    def _early(self, runner: ExitRunner, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self._running:  # the runner itself
            return inner(*args, **kwargs)
        self._running = True
        try:
            out = runner(*args, **kwargs)
        finally:
            self._running = False
        if self._tested is not None:
            self._tested.answered(out)
        logits = out.logits.clone()  # an inference tensor outside of it
        if runner.stages.stack.reads == "any":
            return logits
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=logits)
