"""The part of EarlyExit that looks on: what exits say of a validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gateplug.core.batches import Call, first_sample, labels_of, logits_of
from gateplug.core.cost import still
from gateplug.core.errors import PlugError
from gateplug.core.frozen import Frozen
from gateplug.core.plug import Plug
from gateplug.early_exit.branch import ExitBranch, Reading, last_places
from gateplug.early_exit.conformal import VARIANTS, conformal_thresholds
from gateplug.early_exit.costs import exit_costs
from gateplug.early_exit.latency import exit_times
from gateplug.early_exit.runner import ExitRunner
from gateplug.early_exit.schedule import Phase, Schedule
from gateplug.early_exit.tested import TestRecords
from gateplug.early_exit.validation import RULES, ExitRecords, Seen, look, scores_of


class JudgedExits(Plug):
    """What :class:`EarlyExit` does in validation. It sets the arguments, `_branches` and `_net`."""

    gate: str
    mode: str
    threshold: float
    operating_point: dict[str, float] | None
    weighting: str
    cost_weight: float
    freeze_backbone: bool
    cumulative: bool
    warmup_epochs: int
    every: int
    latency: Sequence[int]
    alpha: float
    seen: Seen | None
    """What the last validation said."""
    cost: Tensor | None
    """(L,) of each exit, as a share of the whole network's."""
    _classes: int
    _branches: list[ExitBranch]
    _net: nn.Module

    def _begin(self) -> None:
        self.seen, self.cost = None, None
        self._branches, self._frozen = [], Frozen()
        self._schedule: Schedule | None = None
        self._restored: dict[str, Any] = {}
        self._pos_weight: Tensor | None = None
        self._phase: Phase | None = None
        self._records: ExitRecords | None = None
        self._labels: Tensor | None = None
        self._logits: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._tested: TestRecords | None = None
        self._running = False
        self._history: list[Tensor] = []
        """(L,) share of samples that left at each exit, of every validation after the warm-up."""
        self._conformal: dict[str, Tensor] = {}
        """Variant -> (L,) thresholds of conformal sets, from the last validation."""
        self._example: tuple[Call, int] | None = None
        """A call of the network, and its samples."""
        self._times: dict[int, Tensor] = {}
        """Batch size -> (L,) median seconds of the exits."""

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to record."""
        if self._handles and not trainer.sanity_checking:
            self._records = ExitRecords(len(self._branches) + 1).to(pl_module.device)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Listen."""
        self._hear(self._records is not None)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record."""
        heads = [branch.logits for branch in self._branches]
        if self._records is not None and self._logits is not None:
            z = [h for h in heads if h is not None]
            gates = self._gate_logits(z).sigmoid()
            scores = {rule: scores_of(rule, self.mode, gates, torch.stack(z, 1)) for rule in RULES}
            self._records.update(scores, torch.stack([*z, self._logits], 1), labels_of(batch))
        self._hear(False)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was seen; weigh the gates' classes by it; keep the best heads of a warm-up."""
        records, self._records = self._records, None
        if records is None or self.cost is None or self._schedule is None:
            return
        target, spent = self.operating_point, self.cost
        if target is not None and "latency" in target:
            spent = self._timed(trainer, pl_module, int(target.get("batch", 1)))
            target = {"cost": target["latency"]}
        if target is not None and float(spent[0]) > target.get("cost", torch.inf):
            raise PlugError(
                f"EarlyExit cannot fit operating_point={self.operating_point}: to leave at the first exit takes "
                f"{float(spent[0]):.4g} already. Allow more, or put an exit on an earlier block"
            )
        target = None if self._schedule.warm else target
        seen = look(records, self.gate, self.threshold, target, self.cost, self.cost_weight, self.cumulative, spent)
        if seen is None:
            return
        for branch in self._branches:
            branch.threshold.fill_(seen.threshold)
        self.seen, self._pos_weight = seen, seen.pos_weight
        for i, accuracy in enumerate(seen.accuracy.tolist()):
            pl_module.log(f"early_exit/exit{i}/accuracy", accuracy, sync_dist=True)
            pl_module.log(f"early_exit/exit{i}/left", float(seen.left[i]), sync_dist=True)
            pl_module.log(f"early_exit/exit{i}/calibration_error", float(seen.calibration[i]), sync_dist=True)
        pl_module.log("early_exit/calibration_error", float(seen.calibration[-1]), sync_dist=True)
        pl_module.log("early_exit/accuracy", seen.answered, sync_dist=True, prog_bar=True)
        pl_module.log("early_exit/cost", seen.cost, sync_dist=True, prog_bar=True)
        if self._schedule.warm:
            self._schedule.validated(seen.accuracy[:-1].tolist(), [branch.head for branch in self._branches])
        else:
            self._history.append(seen.left)
        true = seen.found["true"]
        self._conformal = {v: conformal_thresholds(true, seen.exit, self.alpha, v) for v in VARIANTS}

    def _timed(self, trainer: Trainer, module: LightningModule, batch: int) -> Tensor:
        """(L,) median seconds of a batch that leaves at each exit; measured once, on the first process, for all of them."""
        if batch not in self._times:
            assert self._example is not None
            seconds = None
            if trainer.is_global_zero:
                with still(module):
                    seconds = exit_times(ExitRunner(module), *self._example, batch=batch).median.cummax(0).values
            told: Any = trainer.strategy.broadcast(seconds)
            self._times[batch] = told
        return self._times[batch]

    # ------------------------------------------------------------------ listening

    def _listen(self, on: bool) -> None:
        while self._handles:
            self._handles.pop().remove()
        if on:
            self._handles.append(self._net.register_forward_hook(self._answered, with_kwargs=True))
            self._handles.append(self._net.register_forward_pre_hook(self._called, with_kwargs=True))

    def _hear(self, on: bool) -> None:
        self._logits = None
        for branch in self._branches:
            branch.listening = on
            branch.forget()

    def _called(self, net: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for branch in self._branches:
            if isinstance(branch.reading, Reading) and branch.reading.reads == "last":
                branch.reading.places = last_places(args, kwargs, net.config.pad_token_id)  # type: ignore[union-attr, arg-type]

    def _answered(self, net: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if not self._branches[0].listening:
            return
        heard = [branch.hidden for branch in self._branches]
        self._logits = logits_of(out)
        if self._records is not None and self._example is None:
            self._example = ((args, {k: v for k, v in kwargs.items() if k != "labels"}), len(self._logits))
        if self.cost is None:
            self._check_classes()
            size = len(self._logits)
            one = (first_sample(args, size), first_sample(kwargs, size))
            self._listen(False)  # the count calls the network once more
            self._called(net, *one)
            self.cost = exit_costs(net, self._branches, one)
            self._called(net, args, kwargs)
            self._listen(True)
            for branch, hidden, cost in zip(self._branches, heard, self.cost[:-1].tolist(), strict=True):
                branch.hidden = hidden
                branch.cost.fill_(cost)

    def _check_classes(self) -> None:
        """Before the first loss: heads and network must speak of the same classes."""
        head = self._branches[0].logits
        if head is not None and self._logits is not None and head.shape != self._logits.shape:
            raise ValueError(
                f"the network gives logits of shape {tuple(self._logits.shape)}, and an exit {tuple(head.shape)}: give "
                f"EarlyExit classes={self._logits.shape[-1]}"
            )

    def _gate_logits(self, logits: list[Tensor]) -> Tensor:
        return torch.stack([branch.gate(z) for branch, z in zip(self._branches, logits, strict=True)], 1)
