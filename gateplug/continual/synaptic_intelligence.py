"""Synaptic intelligence: what brought the loss of earlier tasks down moves least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from gateplug.continual.functional import si_importance, si_path
from gateplug.continual.penalty import Penalty, held, trained
from gateplug.continual.pulled import Pulled
from gateplug.core.errors import real_numbers
from gateplug.core.update import AroundUpdate


class SynapticIntelligence(Pulled):
    """Synaptic intelligence (Zenke, Poole, Ganguli 2017, arXiv 1703.04200).

    In every update ω ← ω − g · Δθ: what the move of each parameter took off the loss. g is the gradient of the loss without the
    penalty, whole (all micro-batches, all processes), unscaled and not clipped; Δθ is what the optimizer really did, whatever it
    is; an update that a GradScaler skips counts nothing. At the end of a task

        Ω ← Ω + max(ω, 0) / ((θ − θ_start)² + ξ),   ω ← 0

    and the loss has a further term c Σ Ω (θ − θ*)², θ* the parameters after the last task. Terms of other plugs belong to the
    loss. All trainable parameters count; memory is three numbers a parameter, and two more within an update.

    By hand, without a Trainer: `loss = si.total_loss(net, loss)`, and after backward `si.before_step(net)`, `optimizer.step()`,
    `si.after_step(net)`; `si.consolidate(net)` after each task.

    Args:
        weight: c ≥ 0; the paper has .1 for permuted MNIST. Short tasks gather little ω and take more.
        xi: ξ > 0: keeps the importance of what hardly moved finite; the paper has .1 and 1e-3.

    Raises:
        ValueError: a number out of its range.
    """

    summary: ClassVar[str] = "holds what brought the loss of earlier tasks down (synaptic intelligence)"
    paper: ClassVar[str] = "arXiv 1703.04200"
    term: ClassVar[str] = "si"
    factor: ClassVar[float] = 2.0

    def __init__(self, weight: float = 0.1, xi: float = 0.1) -> None:
        self._start(weight)
        real_numbers(xi=xi)
        if not 0 < xi < float("inf"):
            raise ValueError(f"xi={xi!r} must be a finite number > 0: without it what never moved would matter without bound")
        self.xi = xi
        self.omega: dict[str, Tensor] = {}
        """Path integral of the running task, by the parameter's name."""
        self._around: AroundUpdate | None = None
        self._gradient: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._asked = 0
        """How often the penalty was added since the last update."""
        self._pulled: dict[str, Tensor] = {}
        """Gradient of a penalty that was exchanged for another one between two micro-batches of an update."""

    # ------------------------------------------------------------------ by hand

    def before_step(self, module: nn.Module, shares: float = 1.0) -> None:
        """Take the gradient, right before `optimizer.step()`.

        Args:
            module: with its gradients.
            shares: how many times they contain that of the penalty: 1 for the mean of micro-batches, n for a sum of n.
        """
        self._take_gradient(module, shares)
        self._hold(module)

    def after_step(self, module: nn.Module) -> None:
        """Count what the move has brought, right after `optimizer.step()`."""
        for name, p in trained(module).items():
            g, before = self._gradient.get(name), self._before.get(name)
            if g is None or before is None:
                continue
            delta, omega = held(p) - before, self.omega[name]
            # where nothing moved nothing was gained: a fused optimizer skips an update with an infinite gradient by itself
            self.omega[name] = torch.where(delta != 0, si_path(omega, g, delta), omega)
        self._gradient, self._before = {}, {}

    def consolidate(self, module: nn.Module) -> None:
        """End a task: hold what mattered in it from now on. For a loop of one's own; with a stream it is done."""
        parameters = trained(module)
        self._begin(parameters)
        penalty = self.penalty
        found = {
            name: si_importance(penalty.importance[name], self.omega[name], held(p), penalty.anchor[name], self.xi)
            for name, p in parameters.items()
        }
        penalty.replace(found, parameters)
        self.omega = {name: torch.zeros_like(omega) for name, omega in self.omega.items()}

    # ------------------------------------------------------------------ a fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand around the updates."""
        super().on_fit_start(trainer, pl_module)
        self._clear()
        self._around = AroundUpdate(trainer.optimizers[0], lambda: self._hold(pl_module), lambda: self.after_step(pl_module))

    def on_task_start(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """The path begins here."""
        if not self.penalty.tasks:  # what was taken up before a first task that is begun anew
            self.penalty, self.omega = Penalty(), {}
        self._begin(trained(module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradient before it is clipped."""
        if self.task is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # a fused optimizer takes the scale off by itself, later
        scale = scaler.get_scale() if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
        self._take_gradient(pl_module, self._asked / trainer.accumulate_grad_batches, scale)

    def on_task_end(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """Hold what mattered."""
        # an update that is not complete has the gradient of the penalty that ends here
        self._pulled = self._penalty_gradient(trained(module), self._asked / trainer.accumulate_grad_batches)
        self._asked = 0
        self.consolidate(module)
        self._log(trainer)

    def terms(self, module: nn.Module) -> Mapping[str, Tensor]:
        """The penalty, from the end of the first task on."""
        terms = super().terms(module)
        self._asked += len(terms)
        return terms

    def kept(self) -> dict[str, dict[str, Tensor]]:
        """What is kept."""
        return {**super().kept(), "path integral": self.omega}

    def _begin(self, parameters: Mapping[str, Tensor]) -> None:
        self.penalty.begin(parameters)
        for name in parameters:
            if name not in self.omega:
                self.omega[name] = torch.zeros_like(self.penalty.anchor[name])

    def _take_gradient(self, module: nn.Module, shares: float, scale: float = 1.0) -> None:
        parameters = trained(module)
        self._begin(parameters)
        penalty = self._penalty_gradient(parameters, shares)
        self._gradient = {}
        for name, p in parameters.items():
            if p.grad is not None:
                g = held(p.grad) if scale == 1 else held(p.grad) / scale
                self._gradient[name] = g.sub_(penalty[name]) if name in penalty else g
        self._asked, self._pulled = 0, {}

    def _penalty_gradient(self, parameters: Mapping[str, Tensor], shares: float) -> dict[str, Tensor]:
        """What the penalty has put into the gradients since the last update."""
        found, factor = dict(self._pulled), self.weight * self.factor * shares
        if factor and self.penalty.tasks:
            for name, p in parameters.items():
                g = factor * self.penalty.gradient(name, p)
                found[name] = found[name] + g if name in found else g
        return found

    def _hold(self, module: nn.Module) -> None:
        self._before = {name: held(p) for name, p in trained(module).items() if name in self._gradient}

    def _clear(self) -> None:
        if self._around is not None:
            self._around.remove()
            self._around = None
        self._gradient, self._before, self._pulled, self._asked = {}, {}, {}, 0

    def _release(self, module: nn.Module) -> None:
        super()._release(module)
        self._clear()

    # ------------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "omega": dict(self.omega)}

    def _take(self, state: Mapping[str, Any], module: nn.Module) -> None:
        super()._take(state, module)
        self.omega = self._fitting(state["omega"], module)
