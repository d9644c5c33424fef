"""The part of EarlyExit that a Trainer runs: phases, terms, and what a validation says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from gateplug.core.batches import labels_of
from gateplug.core.errors import PlugError
from gateplug.core.graph import keep
from gateplug.core.wrap import unwrap
from gateplug.early_exit.functional import best_exit, exit_probabilities
from gateplug.early_exit.leaving import LeavingExits
from gateplug.early_exit.losses import gate_loss, gate_targets, inference_loss, warmup_loss
from gateplug.early_exit.operating import nearest_point
from gateplug.early_exit.report import can_time, show, time_exits, warn_dear
from gateplug.early_exit.schedule import Schedule, rest


class TrainedExits(LeavingExits):
    """What :class:`EarlyExit` does from the start of a fit to its end."""

    # ------------------------------------------------------------------ a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach, and hold the network still before a strategy wraps it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.freeze_backbone and self._branches:
            self._frozen.hold(self._net, self._branches)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the network."""
        super().on_fit_start(trainer, pl_module)
        if self.freeze_backbone:
            self._frozen.hold(self._net, self._branches)
        self._schedule = Schedule(len(self._branches), self.warmup_epochs, self.every)
        self.cost, self.seen, self._pos_weight = None, None, None
        self._conformal, self._history, self._times, self._example = {}, [], {}, None
        if self._restored:
            self._schedule.load_state_dict(self._restored["schedule"])
            self.cost, self._pos_weight = self._restored["cost"], self._restored["pos_weight"]
            self._conformal, self._history = self._restored["conformal"], list(self._restored["history"])
            self._restored = {}
        elif self.cost_weight == 0 and self.gate == "jei":
            rank_zero_warn("EarlyExit with cost_weight=0: running on costs nothing, so that hardly a sample will leave early")
        if self.gate == "jei" and self.cost_weight >= math.log(self._classes):
            rank_zero_warn(
                f"EarlyExit with cost_weight={self.cost_weight} ≥ ln {self._classes}, what a blind guess loses: a wrong answer "
                "is cheaper than the network, and all samples will leave at the first exit"
            )
        self._listen(True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what a short epoch changes."""
        super().on_train_start(trainer, pl_module)
        assert self._schedule is not None
        if not trainer.enable_validation:
            rank_zero_warn(
                "EarlyExit without validation data: heads are not kept at their best, gates are not balanced by what is best for "
                "whom, and there are no operating points. Give the fit a validation set"
            )
        length = self._schedule.length(trainer.accumulate_grad_batches, trainer.num_training_batches)
        if length < self.every and self.gate == "jei":
            rank_zero_warn(
                f"EarlyExit: an epoch has {trainer.num_training_batches} batches, so a phase takes {length} of them and not "
                f"{self.every}: gates and heads are both trained in every epoch"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls `train()` on the whole module."""
        if self.freeze_backbone:
            self._frozen.still(self._net, self._branches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose the phase."""
        assert self._schedule is not None
        self._labels = labels_of(batch)
        place = (batch_idx, trainer.current_epoch, trainer.accumulate_grad_batches, trainer.num_training_batches)
        self._phase = self._schedule.phase(*place)
        if self._phase == "gate" and self.gate != "jei":
            self._phase = "inference"
        self._hear(True)

    def terms(self, module: nn.Module) -> Mapping[str, Tensor]:
        """The loss of the phase, on the batch that has just run."""
        if self._phase is None or self._labels is None or self._logits is None or not self._branches:
            return {}
        assert self._schedule is not None
        kept = self._labels != -100  # no label
        self._labels, self._logits = self._labels[kept], self._logits[kept]
        logits = [None if z is None else z[kept] for z in (branch.logits for branch in self._branches)]
        with torch.autocast(self._labels.device.type, enabled=False):
            if self._phase == "warmup":
                heads = [z.detach() if r else z for z, r in zip(logits, self._schedule.resting, strict=True) if z is not None]
                term = warmup_loss(self._cross_entropies([*heads, self._logits]))
            elif self._phase == "gate":
                term = self._gate_term([z.detach() for z in logits if z is not None])
            else:
                term = self._inference_term([z for z in logits if z is not None])
        self._send_back(term)
        return {self._phase: keep(term, [p for branch in self._branches for p in branch.parameters()])}

    def _send_back(self, term: Tensor) -> None:
        """Leave with each exit what its block gets from the term; it is put in when backward comes by."""
        sending = [branch for branch in self._branches if branch.hidden is not None and branch.hidden.requires_grad]
        if not sending or not term.requires_grad:
            return
        hidden = [branch.hidden for branch in sending if branch.hidden is not None]
        gradients = torch.autograd.grad(term, hidden, retain_graph=True, allow_unused=True)
        for branch, gradient in zip(sending, gradients, strict=True):
            branch.gradient = gradient

    def _cross_entropies(self, logits: list[Tensor]) -> Tensor:
        assert self._labels is not None
        return torch.stack([nn.functional.cross_entropy(z, self._labels, reduction="none") for z in logits], 1)

    def _gate_term(self, logits: list[Tensor]) -> Tensor:
        assert self._logits is not None
        assert self.cost is not None
        ce = self._cross_entropies([*logits, self._logits.detach()])
        best = best_exit(ce, self.cost.to(ce), self.cost_weight)
        a = self._gate_logits(logits)
        weight = None if self._pos_weight is None else self._pos_weight.to(a)
        return gate_loss(a, gate_targets(best, len(logits)).to(a), weight)

    def _inference_term(self, logits: list[Tensor]) -> Tensor:
        ce = self._cross_entropies(logits)
        if self.gate != "jei" or self.weighting == "uniform":
            return inference_loss(ce, torch.ones_like(ce), "uniform")
        with torch.no_grad():
            shares = exit_probabilities(self._gate_logits(logits).sigmoid(), self.mode)[:, :-1]
        return inference_loss(ce, shares.to(ce), self.weighting)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Who rests gets no gradient, not even zeros."""
        assert self._schedule is not None
        for i, branch in enumerate(self._branches):
            if self._phase == "gate" or (self._phase == "warmup" and self._schedule.resting[i]):
                rest(list(branch.head.parameters()))
            if self._phase != "gate":
                rest(list(branch.gate.parameters()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Forget the batch."""
        self._hear(False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The warm-up may be over."""
        assert self._schedule is not None
        if self._schedule.warm:
            self._schedule.epoch_over([branch.head for branch in self._branches])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the exits, and say what was not trained."""
        assert self._schedule is not None
        if self._schedule.warm:
            rank_zero_warn(
                f"EarlyExit: the run ended within the warm-up (warmup_epochs={self.warmup_epochs}), so the gates are untrained. "
                "Train longer, or give a shorter warm-up"
            )
        if self.seen is not None and not self._schedule.warm and float(self.seen.left.max()) > 0.99:
            where = int(self.seen.left.argmax())
            rank_zero_warn(
                f"EarlyExit: {self.seen.left[where]:.1%} of the validation's samples leave at exit {where} of "
                f"{len(self._branches)} (gate={self.gate!r}, mode={self.mode!r}, threshold={self.threshold}, "
                f"cost_weight={self.cost_weight}): the gates tell no sample from another. Another cost_weight or threshold, a "
                "larger lr_scale or a longer training may help"
            )
        if self.seen is not None and self.seen.missed is not None:
            rank_zero_warn(
                f"EarlyExit: operating_point={self.operating_point} was not reached in the last validation. The threshold in use "
                f"is the cheapest with the best accuracy there is, {self.seen.missed:.4f}"
            )
        asked = (self.operating_point or {}).get("cost", 0.0)
        if self.seen is not None and self.seen.cost < 0.9 * asked and not self._schedule.warm:
            rank_zero_warn(
                f"EarlyExit: operating_point={self.operating_point} is not used up: the dearest threshold within it comes to "
                f"{self.seen.cost:.4f}, and the next lets nobody leave. Scores of modes 'official' and 'cdf' are 1 as soon as "
                "the gates so far add up to 1; mode='hazard' reaches every cost"
            )
        if self.seen is not None and self.cost is not None:
            show(trainer, self.seen, self.cost, self._history)
            if self.latency and self._example is not None and can_time(trainer):
                times = time_exits(trainer, pl_module, self.seen, self._example, self.latency)
                if not self._schedule.warm:
                    warn_dear(times, self.seen)
        self._example = None

    def _release(self, module: nn.Module) -> None:
        super()._release(module)
        self._listen(False)
        self._hear(False)
        if self._branches:
            unwrap(self._net, self)
        self._frozen.release()
        self._phase, self._labels = None, None

    def threshold_for(self, *, cost: float | None = None, accuracy: float | None = None, gate: str | None = None) -> float:
        """The threshold of a rule that meets a target on the last validation.

        Args:
            cost: mean share of the network's multiply-adds that may be spent; or
            accuracy: share of right answers to reach, by the cheapest threshold.
            gate: the rule; None for the one in use.

        Raises:
            ValueError: not one target, or it cannot be met (says what can).
            PlugError: there was no validation.
        """
        if self.seen is None:
            raise PlugError(
                "EarlyExit has seen no validation: a threshold is fitted to its samples. Give the fit a validation set"
            )
        return nearest_point(self.seen.points[gate or self.gate], cost, accuracy)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The arguments, where the training stands, the costs and the weights of the gates' classes."""
        state = super().state_dict()
        if self._schedule is not None:
            state |= {"schedule": self._schedule.state_dict(), "cost": self.cost, "pos_weight": self._pos_weight}
            state |= {"conformal": self._conformal, "history": self._history}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it, for the fit that begins."""
        self._restored = state_dict if "schedule" in state_dict else {}
